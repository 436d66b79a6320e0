"""The names that options of the `bench` commands take.

`--help` reads them here: the tables that have them as keys import PyTorch. A test compares the two.
"""

# of `peers.IMPLEMENTATIONS`
IMPLEMENTATIONS = (
    *("fused", "eager", "compile", "compile-max-autotune", "liger", "liger-mlp", "quack", "packed-gemm", "two-gemms"),
    *("batch-invariant", "fp8", "torchao-fp8"),
)
# the others tune themselves for each problem, which takes far longer than the measurement
DEFAULT = ("fused", "eager", "compile", "liger", "packed-gemm", "two-gemms")

# of `generate.MODELS` and `generate.MODES`
MODELS = ("llama-3-8b", "pythia-6.9b", "qwen3-30b-a3b")
MODES = ("eager", "static-compile")

# of `wrapped.WRAPPINGS`
WRAPPINGS = (
    *("plain", "lora", "lora-two", "lora-merged", "lora-training", "autocast", "hooks", "bnb-8bit", "bnb-4bit"),
    *("device-map-2", "tensor-parallel-2"),
)

# of `encoders.ENCODERS`
ENCODERS = (
    *("bert-base", "vit-base", "clip-base-vision", "siglip-base-vision", "t5-base-encoder", "modernbert-base"),
    *("pythia-160m", "gpt2", "qwen2.5-0.5b"),
)

# of `experts.SHAPES`
EXPERTS = (
    *("qwen3-30b-a3b", "mixtral-8x7b", "olmoe-1b-7b", "gpt-oss-20b", "deepseek-v2-lite", "gemma-4-26b-a4b"),
    "deepseek-v3",
)
ROUTINGS = ("uniform", "zipf")
# as Transformers calls them; "eager" waits for the GPU in every call, so it is timed without a graph
EXPERTS_IMPLEMENTATIONS = (
    *("fused", "grouped_mm", "batched_mm", "batched_mm-max-autotune", "eager"),
    *("sonicmoe", "deepgemm"),
)
