"""The loops over routed experts in Transformers, as text to compare a class with. They are never run.

`LOOPS` are the eager forwards, `GATES` what `_apply_gate` may be. Names of local variables do not count.
"""

# mypy: ignore-errors

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def _default(self, hidden_states, top_k_index, top_k_weights):
    final_hidden_states = torch.zeros_like(hidden_states)
    with torch.no_grad():
        expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate, up = F.linear(current_state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
        current_hidden_states = self.act_fn(gate) * up
        current_hidden_states = F.linear(current_hidden_states, self.down_proj[expert_idx])
        current_hidden_states = current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
        final_hidden_states.index_add_(0, token_idx, current_hidden_states.to(final_hidden_states.dtype))
    return final_hidden_states


def _by_gate(self, hidden_states, top_k_index, top_k_weights):
    final = torch.zeros_like(hidden_states)
    with torch.no_grad():
        mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(mask[expert_idx])
        current = self._apply_gate(F.linear(hidden_states[token_idx], self.gate_up_proj[expert_idx]))
        current = F.linear(current, self.down_proj[expert_idx]) * top_k_weights[token_idx, top_k_pos, None]
        final.index_add_(0, token_idx, current.to(final.dtype))
    return final


def _transposed(self, hidden_states, top_k_index, top_k_weights):
    final_hidden_states = torch.zeros_like(hidden_states)
    with torch.no_grad():
        expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate, up = (current_state @ self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
        current_hidden_states = self.act_fn(gate) * up
        current_hidden_states = current_hidden_states @ self.down_proj[expert_idx]
        current_hidden_states = current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
        final_hidden_states.index_add_(0, token_idx, current_hidden_states.to(final_hidden_states.dtype))
    return final_hidden_states


def _with_biases(self, hidden_states, router_indices=None, routing_weights=None):
    next_states = torch.zeros_like(hidden_states, dtype=hidden_states.dtype, device=hidden_states.device)
    with torch.no_grad():
        expert_mask = F.one_hot(router_indices, num_classes=self.num_experts)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate_up = current_state @ self.gate_up_proj[expert_idx] + self.gate_up_proj_bias[expert_idx]
        gated_output = self._apply_gate(gate_up)
        out = gated_output @ self.down_proj[expert_idx] + self.down_proj_bias[expert_idx]
        weighted_output = out * routing_weights[token_idx, top_k_pos, None]
        next_states.index_add_(0, token_idx, weighted_output.to(hidden_states.dtype))
    return next_states


def _in_fp32(self, hidden_states, router_indices=None, routing_weights=None):
    original_dtype = hidden_states.dtype
    next_states = torch.zeros_like(hidden_states, dtype=torch.float32, device=hidden_states.device)
    with torch.no_grad():
        expert_mask = F.one_hot(router_indices, num_classes=self.num_experts)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate_up = (
            current_state.float() @ self.gate_up_proj[expert_idx].float() + self.gate_up_proj_bias[expert_idx].float()
        )
        gated_output = self._apply_gate(gate_up).float()
        out = gated_output.float() @ self.down_proj[expert_idx].float() + self.down_proj_bias[expert_idx].float()
        weighted_output = out * routing_weights[token_idx, top_k_pos, None].float()
        next_states.index_add_(0, token_idx, weighted_output)
    return next_states.to(original_dtype)


def _ungated(self, hidden_states, top_k_index, top_k_weights):
    final_hidden_states = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
    with torch.no_grad():
        expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero().squeeze(-1)
    for expert_idx in expert_hit:
        expert_idx = expert_idx.item()
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        if token_idx.numel() == 0:
            continue
        current_state = hidden_states[token_idx]
        current_hidden_states = F.linear(current_state, self.up_proj[expert_idx])
        current_hidden_states = self.act_fn(current_hidden_states)
        current_hidden_states = F.linear(current_hidden_states, self.down_proj[expert_idx])
        current_hidden_states = current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
        final_hidden_states.index_add_(0, token_idx, current_hidden_states.to(final_hidden_states.dtype))
    return final_hidden_states.to(hidden_states.dtype)


def _fp8(self, hidden_states, top_k_index, top_k_weights):
    final_hidden_states = torch.zeros_like(hidden_states, dtype=torch.float32)
    with torch.no_grad():
        expert_mask = torch.nn.functional.one_hot(top_k_index, num_classes=self.num_experts + 1)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero(as_tuple=False).view(-1)
    for expert_idx in expert_hit:
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate_up_act_scale = (
            self.gate_up_proj_activation_scale[expert_idx] if self.activation_scheme == "static" else None
        )
        proj_out = self.linear(
            current_state,
            self.gate_up_proj[expert_idx] if self.has_gate else self.up_proj[expert_idx],
            self.gate_up_proj_scale_inv[expert_idx] if self.has_gate else self.up_proj_scale_inv[expert_idx],
            activation_scale=gate_up_act_scale,
        )
        proj_out = self._apply_gate(proj_out) if self.has_gate else self.act_fn(proj_out)
        down_act_scale = self.down_proj_activation_scale[expert_idx] if self.activation_scheme == "static" else None
        proj_out = self.linear(
            proj_out,
            self.down_proj[expert_idx],
            self.down_proj_scale_inv[expert_idx],
            activation_scale=down_act_scale,
        )
        routing_weights = top_k_weights[token_idx, top_k_pos, None]
        weighted_out = proj_out * routing_weights.to(proj_out.dtype)
        final_hidden_states.index_add_(0, token_idx, weighted_out.to(final_hidden_states.dtype))
    return final_hidden_states.to(hidden_states.dtype)


def _halves(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


def _halves_in_fp32(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return (self.act_fn(gate.float()) * up.float()).to(gate.dtype)


def _clamped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up


def _clamped_silu(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(min=None, max=self.swiglu_limit)
    up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
    return F.silu(gate) * up


def _swish(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


def _interleaved_swish(self, gate_up):
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


def _swiglu(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.swiglu_limit)
    up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
    glu = gate * torch.sigmoid(gate * self.swiglu_alpha)
    return (up + 1.0) * glu


def _clamped_last(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = self.act_fn(gate).clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return gate * up


def _of_fp8(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    if self.gate_softcap is not None:
        input_dtype = gate.dtype
        gate, up = gate.float(), up.float()
        gate_factor = torch.tanh(gate / self.gate_softcap) * self.gate_softcap
        up = torch.tanh(up / self.up_softcap) * self.up_softcap
        return (gate_factor * torch.sigmoid(gate) * up).to(input_dtype)
    if self.swiglu_alpha is not None:
        gate = gate.clamp(max=self.swiglu_limit)
        up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
        glu = gate * torch.sigmoid(gate * self.swiglu_alpha)
        return (up + 1.0) * glu
    elif self.limit is not None:
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up


def _of_fp8_without_softcap(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    if self.swiglu_alpha is not None:
        gate = gate.clamp(max=self.swiglu_limit)
        up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
        glu = gate * torch.sigmoid(gate * self.swiglu_alpha)
        return (up + 1.0) * glu
    elif self.limit is not None:
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up


@dataclass(frozen=True)
class Loop:
    """An eager forward: whether it takes transposed stacks, biases and a gate, and calls `_apply_gate` for that.

    `in_fp32` is true if it computes in fp32 regardless of the dtype of its weights; `scaled`, if it multiplies by
    `linear`, a method of Transformers' `FP8Experts` that takes scales.
    """

    text: object
    transposed: bool = False
    bias: bool = False
    gated: bool = True
    by_gate: bool = False
    in_fp32: bool = False
    scaled: bool = False


@dataclass(frozen=True)
class Gate:
    """An `_apply_gate`: the attributes that hold its limit and the factor in its sigmoid, and what is added to up.

    `activation` is its own; None for the module's `act_fn`, and where there is an `alpha`. If it
    `clamps_last`, after the activation, no kernel computes it unless the limit is infinite. It is what its text says
    where the attributes `without` are None or missing.
    """

    text: object
    activation: str | None = None
    limit: str | None = None
    alpha: str | None = None
    up_offset: float = 0.0
    interleaved: bool = False
    clamps_last: bool = False
    without: tuple[str, ...] = ()


LOOPS = (
    Loop(_default),
    Loop(_by_gate, by_gate=True),
    Loop(_transposed, transposed=True),
    Loop(_with_biases, transposed=True, bias=True, by_gate=True),
    Loop(_in_fp32, transposed=True, bias=True, by_gate=True, in_fp32=True),
    Loop(_ungated, gated=False),
    Loop(_fp8, by_gate=True, scaled=True),
    Loop(_fp8, gated=False, scaled=True),
)
# what a gate may be without
OPTIONAL = "gate_softcap", "swiglu_alpha", "limit"
GATES = (
    Gate(_halves),
    Gate(_halves_in_fp32),
    Gate(_clamped, limit="limit"),
    Gate(_clamped_silu, "silu", limit="swiglu_limit"),
    Gate(_swish, limit="limit", alpha="alpha", up_offset=1.0),
    Gate(_interleaved_swish, limit="limit", alpha="alpha", up_offset=1.0, interleaved=True),
    Gate(_swiglu, limit="swiglu_limit", alpha="swiglu_alpha", up_offset=1.0),
    Gate(_clamped_last, limit="limit", clamps_last=True),
    *(
        row
        for text in (_of_fp8, _of_fp8_without_softcap)
        for row in (
            Gate(text, without=OPTIONAL),
            Gate(text, limit="limit", without=OPTIONAL[:2]),
            Gate(text, limit="swiglu_limit", alpha="swiglu_alpha", up_offset=1.0, without=OPTIONAL[:1]),
        )
    ),
)
