"""`use_fused_mlp` in every way in, and loads without it as they always were."""

import importlib
import json
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from models import MODEL_TYPES, tiny_config, tiny_model, token_ids
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    pipeline,
)

import hf_fused_mlp
from hf_fused_mlp import fusion_report
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.integrations import transformers as hook


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny_model().save_pretrained(path)
    return path


def is_fused(model):
    fused = [isinstance(module, FusedMLP) for name, module in model.named_modules() if name.endswith(".mlp")]
    assert len(fused) == 2
    assert len(set(fused)) == 1
    return fused[0]


@pytest.mark.parametrize("flag", [True, "strict"])
@pytest.mark.parametrize(
    "loader",
    [
        AutoModelForCausalLM,
        AutoModel,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        LlamaForCausalLM,
        LlamaModel,
    ],
)
def test_from_pretrained(loader, flag, directory):
    assert is_fused(loader.from_pretrained(directory, use_fused_mlp=flag))
    assert not is_fused(loader.from_pretrained(directory))
    assert not is_fused(loader.from_pretrained(directory, use_fused_mlp=False))


def test_loading_info_and_own_config(directory):
    config = AutoConfig.from_pretrained(directory)
    model, info = LlamaForCausalLM.from_pretrained(
        directory, config=config, use_fused_mlp=True, output_loading_info=True
    )
    assert is_fused(model)
    assert not info["missing_keys"]


def test_from_config():
    assert is_fused(AutoModelForCausalLM.from_config(tiny_config(), use_fused_mlp=True))
    assert not is_fused(AutoModelForCausalLM.from_config(tiny_config()))


def test_pipeline(directory, byte_tokenizer):
    generator = pipeline(
        "text-generation", str(directory), tokenizer=byte_tokenizer, model_kwargs={"use_fused_mlp": True}
    )
    assert is_fused(generator.model)
    assert generator("ab", max_new_tokens=2)[0]["generated_text"].startswith("ab")


def test_what_the_troubleshooting_page_says_of_pipelines(directory, byte_tokenizer):
    """`pipeline` keeps an argument that it does not know for `generate`, which refuses it; nothing is fused."""
    generator = pipeline("text-generation", str(directory), tokenizer=byte_tokenizer, use_fused_mlp=True)
    assert not is_fused(generator.model)
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['use_fused_mlp'\]"):
        generator("a", max_new_tokens=1)


def test_without_the_import_the_flag_is_refused_as_the_page_says(directory):
    script = (
        f"from transformers import LlamaForCausalLM as M; M.from_pretrained({str(directory)!r}, use_fused_mlp=True)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    refusal = "TypeError: LlamaForCausalLM.__init__() got an unexpected keyword argument 'use_fused_mlp'"
    assert result.stderr.splitlines()[-1] == refusal


@pytest.fixture
def byte_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(i + 32): i for i in range(90)} | {"<unk>": 90}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>")))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"], ids=["single", "sharded"])
@torch.no_grad()
def test_save_and_reload_are_vanilla(model_type, max_shard_size, tmp_path):
    """What a fused model saves is what the unfused model saves, to the bit, and says nothing of us."""
    ids = token_ids(1, 6)
    tiny_model(model_type).save_pretrained(tmp_path / "plain", max_shard_size=max_shard_size)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", use_fused_mlp="strict")
    assert is_fused(fused)
    fused.save_pretrained(tmp_path / "fused", max_shard_size=max_shard_size)
    plain.save_pretrained(tmp_path / "plain", max_shard_size=max_shard_size)

    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "fused").iterdir()) == files
    weights = [name for name in files if name.endswith(".safetensors")]
    assert len(weights) == 1 if max_shard_size == "5GB" else len(weights) > 1
    for name in weights:
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert "fused" not in json.dumps(json.loads((tmp_path / "fused" / "config.json").read_text()))
    vanilla = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert not is_fused(vanilla)
    assert torch.equal(vanilla(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("flag", ["yes please", "Strict", 1, 0, [], b"yes"], ids=repr)
def test_bad_flag(flag, directory):
    with pytest.raises(ValueError, match=r'use_fused_mlp=.*expected True, False, "strict" or a dict of strict, '):
        AutoModelForCausalLM.from_pretrained(directory, use_fused_mlp=flag)
    assert not is_fused(AutoModelForCausalLM.from_pretrained(directory))


def test_options_in_the_flag(directory):
    """A dict takes what `fuse_model` takes."""
    load = AutoModelForCausalLM.from_pretrained
    report = fusion_report(load(directory, use_fused_mlp={"norms": True, "exclude": ["*.0.mlp", "model.norm"]}))
    assert [mlp.state for mlp in report.mlps] == ["fusable", "fused"]
    assert [norm.state for norm in report.norms] == ["fused"] * 4 + ["fusable"]
    assert is_fused(load(directory, use_fused_mlp={}))
    with pytest.raises(ValueError, match="strict: 1 of 1 norms cannot be fused"):
        config = tiny_config("llama")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_fused_mlp.families.norm.find_norm", lambda module: None)
            AutoModelForCausalLM.from_config(
                config, use_fused_mlp={"strict": True, "norms": True, "exclude": ["*layernorm"]}
            )


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"norm": True}, ValueError, "use_fused_mlp: unknown option 'norm'; the options are strict, exclude, norms"),
        ({"norms": "yes"}, TypeError, "norms='yes': expected True or False"),
        ({"strict": 1}, TypeError, "strict=1: expected True or False"),
        ({"exclude": "mlp"}, TypeError, "exclude='mlp' is a string; pass a list"),
        ({"exclude": None}, TypeError, "exclude=None: expected a list of module names"),
        ({"exclude": [3]}, TypeError, r"exclude=\[3\]: expected a list of module names"),
        ({"exclude": ["nothing"]}, ValueError, "exclude: 'nothing' matches no MLP"),
    ],
)
def test_bad_options_in_the_flag(options, error, words, directory):
    with pytest.raises(error, match=words):
        AutoModelForCausalLM.from_pretrained(directory, use_fused_mlp=options)
    assert not is_fused(AutoModelForCausalLM.from_pretrained(directory))


def test_strict_raises_and_the_next_load_is_plain(directory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("hf_fused_mlp.families.mlp.find_spec", lambda module: None)
        with pytest.raises(ValueError, match=r"strict: 2 of 2 MLPs cannot be fused(.|\n)*model.layers.0.mlp"):
            AutoModelForCausalLM.from_pretrained(directory, use_fused_mlp="strict")
    assert not is_fused(AutoModelForCausalLM.from_pretrained(directory))


def test_failed_load_leaves_nothing_behind(directory, tmp_path):
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_fused_mlp=True)
    assert not is_fused(AutoModelForCausalLM.from_pretrained(directory))


def test_threads_do_not_see_each_other():
    """Loads at once, with and without the flag; not real ones, which leave each other's changes in Transformers."""
    models, barrier = [tiny_model() for _ in range(6)], threading.Barrier(6, timeout=60)

    @hook._with_flag
    def load(cls, i):
        barrier.wait()
        return models[i]

    threads = [threading.Thread(target=load, args=(None, i), kwargs={"use_fused_mlp": i % 2 == 0}) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [is_fused(model) for model in models] == [True, False] * 3


def test_load_without_the_flag_is_the_original_function(directory):
    """Same bits before and after, and `uninstall` puts the very same objects back."""
    weights = {name: p.clone() for name, p in LlamaForCausalLM.from_pretrained(directory).state_dict().items()}
    LlamaForCausalLM.from_pretrained(directory, use_fused_mlp=True)
    again = LlamaForCausalLM.from_pretrained(directory).state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights)

    originals = dict(hook._originals)
    hf_fused_mlp.uninstall()
    try:
        assert all(vars(owner)[name] is original for (owner, name), original in originals.items())
        with pytest.raises(TypeError, match="use_fused_mlp"):
            LlamaForCausalLM.from_pretrained(directory, use_fused_mlp=True)
    finally:
        hf_fused_mlp.install()
    hf_fused_mlp.install()
    assert hook._originals == originals
    assert is_fused(LlamaForCausalLM.from_pretrained(directory, use_fused_mlp=True))


def test_uninstall_leaves_another_librarys_wrapper_alone(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda cls, *args, **kwargs: None))
    with pytest.raises(RuntimeError, match="wrapped again"):
        hf_fused_mlp.uninstall()


def test_remote_code(tmp_path):
    """A class that ships with the checkpoint, registered by its user, fuses on load."""
    config = tiny_config()
    config.auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    tiny_model().save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, use_fused_mlp="strict")
    assert type(model).__name__ == "OwnForCausalLM"
    assert is_fused(model)


@pytest.mark.parametrize("version, warned", [("5.17.0", 0), ("5.24.3", 0), ("5.25.0.dev0", 1), ("6.0rc1", 1)])
def test_untested_versions_of_transformers_are_named(version, warned, monkeypatch, caplog):
    """Once, when the flag is installed, which importing the package does."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    hf_fused_mlp.uninstall()
    importlib.reload(hf_fused_mlp)
    hf_fused_mlp.install()
    assert [f"Transformers {version} is newer than 5.24" in message for message in caplog.messages] == [True] * warned


def test_a_config_that_has_a_field_of_the_flags_name(directory, tmp_path):
    """Whoever loads the config first, for a model, leaves the flag to the model."""
    config = json.loads((directory / "config.json").read_text()) | {"use_fused_mlp": False}
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model"
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(path, use_fused_mlp="strict"),
        lambda: LlamaForCausalLM.from_pretrained(path, use_fused_mlp=True),
        lambda: AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, use_fused_mlp=True)[0],
        lambda: given_what_is_left(*AutoConfig.from_pretrained(path, use_fused_mlp=True, return_unused_kwargs=True)),
    ):
        model = load()
        assert is_fused(model)
        assert model.config.use_fused_mlp is False
    # the field is the config's own for who loads the config alone
    assert AutoConfig.from_pretrained(path, use_fused_mlp=True).use_fused_mlp is True


def given_what_is_left(config, left):
    return AutoModelForCausalLM.from_config(config, **left)
