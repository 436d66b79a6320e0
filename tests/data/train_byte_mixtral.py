"""Trains the Mixtral model in `byte_mixtral/`: 1.3 M parameters, 8 experts of which a byte takes 2.

It stands in for a real Mixtral checkpoint in the tests, as the model of `train_byte_neox.py` does for GPT-NeoX. Ten
minutes on one CPU core:

    python tests/data/train_byte_mixtral.py
"""

import sysconfig
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

CONTEXT, BATCH, STEPS = 128, 32, 1500
OUTPUT = Path(__file__).parent / "byte_mixtral"


def main():
    torch.manual_seed(0)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = MixtralForCausalLM(config).train()
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
    for step in range(STEPS):
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1))
        batch = data[starts + torch.arange(CONTEXT)].long()
        loss = model(input_ids=batch, labels=batch, output_router_logits=True).loss  # that of the router included
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:5d}  loss {loss.item():.3f} nats a byte", flush=True)
    model.half().eval().save_pretrained(OUTPUT)


if __name__ == "__main__":
    main()
