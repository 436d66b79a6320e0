"""Importing the package: nothing heavy is imported, and `use_fused_mlp` is installed in every order of imports."""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
import textwrap
import threading
from importlib.resources import files
from types import ModuleType

import pytest
from typer.main import get_command

import hf_fused_mlp
from hf_fused_mlp.cli import BENCH, COMMANDS, app
from hf_fused_mlp.integrations import transformers as hook
from hf_fused_mlp.integrations.on_import import AfterImport

HEAVY = ("torch", "transformers", "triton", "numpy")


def run(script, *args):
    """The standard output of `script` in a new process."""
    command = [sys.executable, "-c", textwrap.dedent(script), *args]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("args", [["--help"], ["bench", "--help"], ["bench"], []], ids=" ".join)
def test_help_imports_nothing_heavy(args):
    script = f"""
    import sys
    from hf_fused_mlp.cli import app
    try:
        app()
    finally:
        print("heavy:", [name for name in {HEAVY} if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *args]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "heavy: []" in result.stdout, result.stderr
    for row in BENCH if "bench" in args else COMMANDS:
        assert f" {row.name} " in result.stdout


@pytest.mark.parametrize("row", [*COMMANDS, *BENCH], ids=lambda row: row.name)
def test_the_line_in_a_groups_help_begins_the_commands_own(row):
    group = get_command(app) if row in COMMANDS else get_command(app).commands["bench"]
    command = group.commands[row.name]
    assert command.help == row.help
    assert command.load().name == row.name
    if row in BENCH:
        assert command.load().help.startswith(f"{row.help}\n")


# what a program does first, in each order; the model is built by `build` at the end
ORDERS = {
    "the package first": "import hf_fused_mlp; import transformers",
    "Transformers first": "import transformers; import hf_fused_mlp",
    "its models first": "from transformers import LlamaForCausalLM; import hf_fused_mlp",
    "a public name": "from hf_fused_mlp import fuse_model; import transformers",
    "everything": "from hf_fused_mlp import *; import transformers",
    "uninstalled and installed again": "import hf_fused_mlp as h; h.uninstall(); h.install(); import transformers",
}
BUILD = """
import sys
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(config, use_fused_mlp=True)
from hf_fused_mlp.integrations.on_import import AfterImport
print(repr(model.model.layers[0].mlp).split("(")[0], [f for f in sys.meta_path if isinstance(f, AfterImport)])
"""


@pytest.mark.parametrize("order", ORDERS)
def test_the_flag_works_in_every_order(order):
    assert run(ORDERS[order] + BUILD) == "FusedLlamaMLP []\n"


def test_importing_the_package_imports_nothing_heavy():
    script = f"import sys, hf_fused_mlp; dir(hf_fused_mlp); print([name for name in {HEAVY} if name in sys.modules])"
    assert run(script) == "[]\n"


def test_uninstalled_before_transformers_is_imported():
    script = """
    import sys, hf_fused_mlp
    before = [finder for finder in sys.meta_path if "AfterImport" not in repr(finder)]
    hf_fused_mlp.uninstall()
    assert sys.meta_path == before
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    try:
        LlamaForCausalLM._from_config(config, use_fused_mlp=True)
    except TypeError as error:
        print("refused:", "use_fused_mlp" in str(error))
    hf_fused_mlp.install()
    print(repr(LlamaForCausalLM._from_config(config, use_fused_mlp=True).model.layers[0].mlp)[:13])
    """
    assert run(script) == "refused: True\nFusedLlamaMLP\n"


def test_an_auto_class_reads_its_config_before_models_are_imported(tmp_path):
    """A config with a field of the flag's name does not take the flag, in a process that has loaded nothing yet."""
    script = """
    import sys, hf_fused_mlp
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.configuration_llama import LlamaConfig
    assert "transformers.modeling_utils" not in sys.modules
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.use_fused_mlp = False
    config.save_pretrained(sys.argv[1])
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], use_fused_mlp="no such value")
    except ValueError as error:
        print(error)
    """
    assert run(script, str(tmp_path)).startswith("use_fused_mlp='no such value': expected True")


def test_threads_that_import_at_once():
    script = """
    import threading
    barrier = threading.Barrier(8)
    errors = []

    def work(i):
        barrier.wait()
        try:
            if i % 2:
                import hf_fused_mlp
                hf_fused_mlp.install()
            else:  # its lazy names fail in threads that import at once, without this package too
                import transformers.models.llama.modeling_llama
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors, errors
    import hf_fused_mlp
    """
    assert run(textwrap.dedent(script) + BUILD) == "FusedLlamaMLP []\n"


def test_reloading():
    script = """
    import importlib, hf_fused_mlp
    importlib.reload(hf_fused_mlp)
    import transformers.modeling_utils
    importlib.reload(hf_fused_mlp)
    importlib.reload(transformers.modeling_utils)
    importlib.reload(hf_fused_mlp)
    """
    assert run(textwrap.dedent(script) + BUILD) == "FusedLlamaMLP []\n"


def test_names():
    """Every public name, once all submodules are imported: none of them has taken the place of one."""
    modules = pkgutil.walk_packages(hf_fused_mlp.__path__, "hf_fused_mlp.")
    for name in (module.name for module in modules if "plots" not in module.name and "__main__" not in module.name):
        if not name.startswith("hf_fused_mlp.kernels"):
            importlib.import_module(name)
    submodules = {module.name for module in pkgutil.iter_modules(hf_fused_mlp.__path__)}
    assert not submodules & {*hf_fused_mlp.__all__}
    for name in hf_fused_mlp.__all__:
        assert not isinstance(getattr(hf_fused_mlp, name), ModuleType), name
    assert {*hf_fused_mlp.__all__} <= {*dir(hf_fused_mlp)}
    assert {*hf_fused_mlp._MODULES} == {*hf_fused_mlp.__all__} - {"__version__", "install", "uninstall"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hf_fused_mlp.nothing  # noqa: B018


def test_loaders_that_are_gone(monkeypatch, caplog):
    """A Transformers without the methods can still be imported."""
    module = ModuleType("transformers.modeling_utils")
    module.PreTrainedModel = type("PreTrainedModel", (), {})
    monkeypatch.setitem(hook._waiting, module.__name__, AfterImport(module.__name__, hook._wrap))
    hook._wrap(module)
    assert [message.split(" that takes")[0] for message in caplog.messages] == [
        f"this Transformers has no PreTrainedModel.{name}" for name in ("from_pretrained", "_from_config")
    ]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a random name with a module, whose code the test writes; nothing is left of either."""
    name = f"package_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = list(sys.meta_path)
    yield tmp_path / name
    assert sys.meta_path == before
    for loaded in (name, f"{name}.module"):
        sys.modules.pop(loaded, None)


def write(package, code):
    (package / "module.py").write_text(textwrap.dedent(code))
    importlib.invalidate_caches()
    return f"{package.name}.module"


def test_called_once_after_the_import(package):
    name, calls = write(package, "value = 1"), []
    finder = AfterImport(name, lambda module: calls.append(module.value))
    finder.start()
    finder.start()
    assert importlib.util.find_spec(name) is not None and calls == []
    module = importlib.import_module(name)
    assert calls == [1]
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert files(module.__package__).joinpath("module.py").is_file()
    importlib.reload(module)
    assert calls == [1]
    finder.start()  # imported already
    assert calls == [1, 1]


def test_a_private_copy_is_not_the_import(package):
    name, calls = write(package, "value = 1"), []
    AfterImport(name, calls.append).start()
    spec = importlib.util.find_spec(name)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.value == 1 and calls == [] and name not in sys.modules
    assert calls == [] and importlib.import_module(name) is calls[0]


def test_a_failed_import_is_waited_for_again(package):
    name, calls = write(package, "raise ImportError('not yet')"), []
    AfterImport(name, calls.append).start()
    for _ in range(2):
        with pytest.raises(ImportError, match="not yet"):
            importlib.import_module(name)
    write(package, "value = 12345")
    assert calls == []
    assert importlib.import_module(name) is calls[0] and len(calls) == 1


def test_no_such_module(package):
    finder = AfterImport(f"{package.name}.nothing", pytest.fail)
    finder.start()
    assert importlib.util.find_spec(f"{package.name}.nothing") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{package.name}.nothing")
    assert finder.stop() and not finder.stop()


def test_a_module_that_is_half_imported(package):
    """Whoever starts to wait in the middle of the import is called at the next import after its end."""
    name = write(
        package,
        """
        from hf_fused_mlp.integrations.on_import import AfterImport
        calls = []
        AfterImport(__name__, lambda module: calls.append(module.value)).start()
        assert calls == []
        value = 1
        """,
    )
    module = importlib.import_module(name)
    (package / "other.py").touch()
    importlib.invalidate_caches()
    importlib.import_module(f"{package.name}.other")
    assert module.calls == [1]


def test_stopped(package):
    finder = AfterImport(write(package, "value = 1"), pytest.fail)
    finder.start()
    spec = importlib.util.find_spec(finder.name)
    assert finder.stop()
    assert finder.find_spec(finder.name) is None
    module = sys.modules[finder.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def test_threads_import_one_module(package):
    name, calls = write(package, "import time; time.sleep(0.05); value = 1"), []
    AfterImport(name, lambda module: calls.append(module.value)).start()
    seen, barrier = [], threading.Barrier(6)

    def work():
        barrier.wait()
        importlib.import_module(name)
        seen.append(len(calls))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1] and seen == [1] * 6


def test_two_finders_that_ask_each_other(package):
    """Two copies of such a hook, as of two libraries."""
    name, calls = write(package, "value = 1"), []
    for _ in range(2):
        AfterImport(name, calls.append).start()
    module = importlib.import_module(name)
    assert calls == [module, module]
