"""`hf-fused-mlp run`: loads a model fused, shows what was fused, and compares answer and speed with the original's."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from hf_fused_mlp.cli.console import console, fail, note, output
from hf_fused_mlp.cli.loading import DTYPES, load_model, load_tokenizer
from hf_fused_mlp.integrations import demo
from hf_fused_mlp.profiling.figures import shown, shown_speedup
from hf_fused_mlp.profiling.report import Speedup
from hf_fused_mlp.report import FusionReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """The answer of one form of the model."""

    text: str
    tokens: list[int]


def run(
    model: Annotated[str | None, typer.Argument(help="A directory or hub id; without it, SmolLM2-135M.")] = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "What is the capital of France?",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 64,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in from_pretrained; the first GPU, or the CPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Load a model fused, and compare its answer and, on a GPU, its speed with the original's."""
    import torch

    from hf_fused_mlp.fuse import fusion_report
    from hf_fused_mlp.numerics.logits import first_difference
    from hf_fused_mlp.tune import unmeasured

    network = load_model(model, dtype, device_map, use_fused_mlp={"norms": True})
    tokenizer = load_tokenizer(model)
    report = fusion_report(network)
    if not as_json:
        output.print(report_table(report))
    if not report.select("fused"):
        if as_json:
            console.print(report_table(report))
        fail("no MLP of this model was fused; the table says why")

    on_gpu = network.device.type == "cuda"
    if unmeasured(network):
        note('no plan was measured for these MLPs on this GPU; use_fused_mlp={"tune": True} measures them once')
    fused, original = compare(network, tokenizer, encode(tokenizer, prompt).to(network.device), max_new_tokens)
    result = {
        "model": model or demo.NAME,
        "device": torch.cuda.get_device_name(network.device) if on_gpu else "cpu",
        "dtype": str(network.dtype).removeprefix("torch."),
        "prompt": prompt,
        "report": report.to_dict(),
        "fused": asdict(fused),
        "original": asdict(original),
        "first_difference": first_difference(fused.tokens, original.tokens),
        "speed": measure(network) if on_gpu else [],
    }
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_answers(result)


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: str):
    """The prompt as the model expects it: a chat turn if the tokenizer has a template."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def compare(network: "PreTrainedModel", tokenizer, inputs, max_new_tokens: int) -> tuple[Answer, Answer]:
    """The greedy answers of `network`, which is fused, and of its original form."""
    from hf_fused_mlp.fuse import unfuse_model

    fused = generate(network, tokenizer, inputs, max_new_tokens, "fused")
    return fused, generate(unfuse_model(network), tokenizer, inputs, max_new_tokens, "original")


def generate(network: "PreTrainedModel", tokenizer, inputs, max_new_tokens: int, label: str) -> Answer:
    """The greedy answer."""
    with progress() as bars:
        bar = bars.add_task(f"generating, {label}", total=max_new_tokens)
        tokens = network.generate(  # type: ignore[operator]  # models that generate mix it in
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            streamer=Ticker(bars, bar),
        )
    new = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    return Answer(tokenizer.decode(new, skip_special_tokens=True), new)


def measure(network: "PreTrainedModel") -> list[dict[str, Any]]:
    """The rows of `measure_speed` for the default request of `audit`; none for a model that `audit` refuses."""
    from hf_fused_mlp.profiling.request import make_request
    from hf_fused_mlp.profiling.speed import FORMS, measure_speed

    try:
        request = make_request(network, 1, None, None, None)
    except (TypeError, ValueError) as error:
        note(f"speed was not measured: {error}")
        return []
    with progress() as bars:
        bar = bars.add_task("timing", total=(1 + request.rounds) * len(FORMS))

        def tell(step: str) -> None:
            bars.update(bar, advance=1, description=f"timing {step}")

        return [asdict(row) for row in measure_speed(network, request, tell)]


class Ticker:
    """A streamer of `generate` that advances a progress bar by each token; the first put is the prompt."""

    def __init__(self, bars: Progress, bar: TaskID):
        self.bars, self.bar, self.seen_prompt = bars, bar, False

    def put(self, value: Any) -> None:
        if self.seen_prompt:
            self.bars.advance(self.bar)
        self.seen_prompt = True

    def end(self) -> None:
        pass


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def report_table(report: FusionReport) -> Table:
    """One line for each class, state and reason."""
    table = Table("class", "MLPs", "state", "remark", title=str(report).splitlines()[0], title_justify="left")
    table.columns[0].overflow = table.columns[3].overflow = "fold"
    for (class_name, state, reason), count in report.grouped().items():
        color = "green" if state == "fused" else "yellow"
        table.add_row(escape(class_name), str(count), f"[{color}]{state}[/]", escape(reason or ""))
    return table


def print_answers(result: dict) -> None:
    fused, original, split = result["fused"], result["original"], result["first_difference"]
    output.print(f"\n[bold]{escape(result['prompt'])}[/]\n{escape(fused['text'])}\n")
    if split is None:
        output.print(f"[green]fused and original agree[/] on all {len(fused['tokens'])} tokens ({result['dtype']})")
    else:
        output.print(f"[yellow]fused and original differ from token {split} on[/]: {escape(original['text'])}")
        output.print(f"in {result['dtype']} a near tie can fall either way; --dtype float32 tells rounding from error")
    if result["device"] == "cpu":
        output.print("Speed needs a GPU: on a CPU both run PyTorch's own arithmetic.")
    elif result["speed"]:
        output.print(speed_table(result["device"], result["speed"]))
        # compiling takes minutes, so it is not timed here
        output.print(
            "Both ran in eager mode. With a static cache and torch.compile, decode waits less for the host; "
            "hf-fused-mlp bench generate MODEL --mode static-compile times that.",
            soft_wrap=True,
        )


def speed_table(device: str, rows: Sequence[dict[str, Any]]) -> Table:
    """One line per phase; `rows` are `Timed`, as dicts."""
    table = Table(escape(device), "eager", "fused + norms", "speedup", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        times = (shown(row[f"{form}_us"], "us") for form in ("original", "fused_norms"))
        table.add_row(row["phase"], *times, shown_speedup(Speedup(**row["speedup"])))
    return table
