"""Writes docs/coverage.md: how many model types fuse, which ones, and a comparison with Liger's list."""

import re
from collections import Counter
from collections.abc import Iterable

import transformers

from hf_fused_mlp.cli.model_types import Entry, Found

# the keys of MODEL_TYPE_TO_APPLY_LIGER_FN in liger_kernel/transformers/monkey_patch.py
LIGER_VERSION = "0.8.5"
LIGER_MODEL_TYPES = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v4", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text"),
    *("gemma4", "gemma4_text", "glm4", "glm4v", "glm4v_moe", "gpt_oss", "granite", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "internvl", "llama", "llama4", "llama4_text", "llava", "ministral", "mistral", "mixtral"),
    *("mllama", "mllama_text_model", "muse_glimmer", "nemotron", "olmo2", "olmo3", "paligemma", "phi3", "pixtral"),
    *("qwen2", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text", "qwen3", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "qwen3_vl_moe_text"),
    *("qwen3_vl_text", "smollm3", "smolvlm"),
)

OUTCOMES = ("every MLP fuses", "some fuse", "none fuses", "no MLP module", "not built")

PAGE = """\
# Which model types fuse

{environment}

    hf-fused-mlp list --all --markdown > docs/coverage.md

{summary}

| model types | |
|---|---:|
{counts}

For each model type we build the model of its default config, with all layers and without weights, and examine it as
`fuse_model` does. This does not show parts that the default config leaves out, or other activations that a checkpoint
may choose; `fusion_report` shows these for your model. An MLP is a single module. In BERT's family this is only the
first half, up and activation. BART's family has none, because up and down belong to the layer itself.
`hf-fused-mlp list --model-type llama` shows one type, and what you can do about a skipped MLP.

## Model types with MLPs

Numbers in round brackets count modules. Numbers in square brackets say why a class is skipped:

{reasons}

| model type | fused | skipped |
|---|---|---|
{rows}

## Liger's model types

Liger {liger_version} lists {liger_count} model types that it patches (`MODEL_TYPE_TO_APPLY_LIGER_FN` in
`liger_kernel/transformers/monkey_patch.py`): norms, rotary embeddings and losses, and in most of them MLPs, including
routed experts. Of these, this package fuses:

| here | Liger's model types |
|---|---|
{liger_rows}

Of the model types that Liger does not list, {others} fuse here, in whole or in part.

## Model types without MLP modules

{without}

## Model types that were not built

{not_built}"""


def summary(entries: list[Entry]) -> str:
    """The counts in one sentence."""
    counts = {outcome: len(_of(entries, outcome)) for outcome in OUTCOMES}
    every, some, none = (counts[outcome] for outcome in OUTCOMES[:3])
    return (
        f"Of {every + some + none} model types that can be built and have MLPs, {every + some} fuse: "
        f"{every} in whole, {some} in part."
    )


def coverage_page(entries: list[Entry]) -> str:
    """The page, for the entries of all model types. Its third line describes the environment."""
    with_mlps = [entry for entry in entries if entry.mlps]
    reasons = list(dict.fromkeys(_reason(mlp) for entry in with_mlps for mlp in entry.select("skipped")))
    liger = [entry for entry in entries if entry.model_type in LIGER_MODEL_TYPES]
    others = [entry for entry in with_mlps if entry.select("fusable") and entry not in liger]
    errors = dict.fromkeys(_problem(entry) for entry in entries if entry.error)
    return PAGE.format(
        environment=_environment(entries),
        summary=summary(entries),
        counts=_table((outcome, len(_of(entries, outcome))) for outcome in OUTCOMES),
        reasons="\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
        rows=_table(
            (
                entry.model_type,
                _classes((mlp.class_name, "", mlp.count) for mlp in entry.select("fusable")),
                _classes(
                    (mlp.class_name, f" [{reasons.index(_reason(mlp)) + 1}]", mlp.count)
                    for mlp in entry.select("skipped")
                ),
            )
            for entry in with_mlps
        ),
        liger_version=LIGER_VERSION,
        liger_count=len(LIGER_MODEL_TYPES),
        liger_rows=_table(
            (f"{outcome}: {len(found)}", _names(found)) for outcome in OUTCOMES if (found := _of(liger, outcome))
        ),
        others=len(others),
        without=_names(_of(entries, "no MLP module")),
        not_built="\n\n".join(
            f"{error[0].upper()}{error[1:]}: {_names(entry for entry in entries if _problem(entry) == error)}"
            for error in errors
        ),
    )


def outcome_of(entry: Entry) -> str:
    """The one of `OUTCOMES` that applies to a model type."""
    every, some, none, no_mlp, not_built = OUTCOMES
    if entry.error:
        return not_built
    if not entry.select("skipped"):
        return every if entry.mlps else no_mlp
    return some if entry.select("fusable") else none


def _of(entries: list[Entry], outcome: str) -> list[Entry]:
    return [entry for entry in entries if outcome_of(entry) == outcome]


def _environment(entries: list[Entry]) -> str:
    """What the results depend on: the version of Transformers, and the missing packages that model types need."""
    missing = {match[1] for entry in entries if (match := re.match(r"it needs (\S+),", entry.error or ""))}
    without = f", without {', '.join(sorted(missing))}" if missing else ""
    return f"Written by this command, with Transformers {transformers.__version__}{without}:"


def _reason(mlp: Found) -> str:
    """Why an MLP is skipped, in the same words for all classes and sizes, and without the remedy."""
    reason = re.sub(r" \([^)]*\)", "", (mlp.reason or "").partition(";")[0])
    return reason.removeprefix(mlp.class_name).lstrip(", ")


def _problem(entry: Entry) -> str:
    """Why there is no model, in the same words for all model types."""
    return (entry.error or "").partition(":")[0]


def _classes(found: Iterable[tuple[str, str, int]]) -> str:
    """Class names, each with its mark and the number of modules."""
    counts: Counter[tuple[str, str]] = Counter()
    for class_name, mark, count in found:
        counts[class_name, mark] += count
    return ", ".join(f"{class_name} ({count}){mark}" for (class_name, mark), count in counts.items())


def _names(entries: Iterable[Entry]) -> str:
    return ", ".join(entry.model_type for entry in entries)


def _table(rows: Iterable[tuple]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
