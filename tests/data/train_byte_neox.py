"""Trains the GPT-NeoX model in `byte_neox/`: 1.3 M parameters, one token a byte, on Python's standard library.

It stands in for a real GPT-NeoX checkpoint in the tests, so that they need no hub. Ten minutes on two CPU cores:

    python tests/data/train_byte_neox.py
"""

import sysconfig
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

CONTEXT, BATCH, STEPS = 128, 32, 1500
OUTPUT = Path(__file__).parent / "byte_neox"


def main():
    torch.manual_seed(0)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    config = GPTNeoXConfig(
        vocab_size=256,
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=STEPS)
    for step in range(STEPS):
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1))
        batch = data[starts + torch.arange(CONTEXT)].long()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:5d}  loss {loss.item():.3f} nats a byte", flush=True)
    model.half().eval().save_pretrained(OUTPUT)


if __name__ == "__main__":
    main()
