"""A file of plans may hold anything: it costs one warning, never a forward."""

import copy
import json
import logging
import os
from dataclasses import replace

import pytest
import torch

from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.tuning import cache
from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.tuning.plan_files import TunedPlan, read
from hf_fused_mlp.types import GPU, TORCH, Plan, ProblemKey, TileConfig

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

H100 = GPU("NVIDIA H100 80GB HBM3", 132, (9, 0), 232448)
KEYS = [ProblemKey(m, 576, 1536, 576, True, "silu", torch.bfloat16, False, True, H100) for m in (16, 32)]
PLAN = Plan(TileConfig("skinny", 16, 64, 64, num_stages=4), TORCH)

fuzzed = hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
ODD = [10**400, -(10**4000), 1 << 14, 1 << 62, 48, 0, -1, 1e308, 1e-9, float("nan"), float("inf"), -float("inf"), True]
ODD += ["", "\ud800", "\0", "x" * 100000, "compiler", "1", None, [], {}, [[]], {"": {}}]
DEEP = "[" * 900 + "]" * 900
values = st.one_of(
    st.sampled_from(ODD),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
)


def places(node, path=()):
    """The paths to everything in a document."""
    yield path
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(child, (*path, key))


def write_good():
    """A user's file of two plans, in place of what there may be."""
    cache.user_file(H100).unlink(missing_ok=True)
    return cache.save([TunedPlan(key, PLAN, 10.5, 14.25) for key in KEYS], H100)


@pytest.fixture
def good(plan_cache):
    return write_good()


def assert_harmless(caplog, path):
    """Each source of plans is asked with at most one warning a file, and `tune` writes anew or says why not."""
    cache.forget()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for key in KEYS:
            assert dispatch.find_plan(key) in (PLAN, heuristic_plan(key)) or key in read(path, H100)
    cache_reads = [record for record in caplog.records if str(path) in record.getMessage()]
    assert len({record.getMessage() for record in cache_reads}) <= 1
    assert all(len(record.getMessage()) < 2000 for record in cache_reads)
    before = path.read_bytes() if path.is_file() else None
    try:
        cache.save([TunedPlan(KEYS[0], PLAN, 1.0, 2.0)], H100)
    except OSError:
        assert before is None or path.read_bytes() == before
    else:
        caplog.clear()
        assert dispatch.find_plan(KEYS[0]) == PLAN
        assert not caplog.records


def test_a_good_file_is_read(good, caplog):
    assert [dispatch.find_plan(key) for key in KEYS] == [PLAN, PLAN]
    assert_harmless(caplog, good)


@fuzzed
@hypothesis.given(st.data())
def test_changed_values(good, caplog, data):
    write_good()
    document = json.loads(good.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(document))))
        if not path:
            document = data.draw(values)
            break
        *outer, last = path
        node = document
        for key in outer:
            node = node[key]
        if data.draw(st.booleans()):
            node[last] = data.draw(values)
        elif isinstance(node, dict):
            value = node.pop(last)
            node[data.draw(st.text() | st.sampled_from(["m", "kernel", "plans"]))] = copy.deepcopy(value)
        else:
            del node[last]
    good.write_text(json.dumps(document))
    assert_harmless(caplog, good)


@fuzzed
@hypothesis.given(st.data())
def test_changed_bytes(good, caplog, data):
    write_good()
    raw = good.read_bytes()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(start, min(len(raw), start + 40)))
        put = data.draw(st.binary(max_size=4) | st.sampled_from([b"NaN", b"9" * 5000, DEEP.encode(), b'"m": 1, ']))
        raw = raw[:start] + put + raw[end:]
    good.write_bytes(raw)
    assert_harmless(caplog, good)


BAD = {
    "a BOM": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    "UTF-16": lambda path: path.write_text(path.read_text(), encoding="utf-16"),
    "other bytes": lambda path: path.write_bytes(b"\xff" + path.read_bytes()),
    "a large integer": lambda path: path.write_text(path.read_text().replace("10.5", "9" * 5000)),
    "a long number": lambda path: path.write_text(path.read_text().replace("10.5", "9" * 400)),
    "a deep value": lambda path: path.write_text(path.read_text().replace("10.5", DEEP)),
    "a deep header": lambda path: path.write_text(path.read_text().replace('"format": 1', f'"format": {DEEP}')),
    "kernels of a list": lambda path: path.write_text(
        json.dumps(json.loads(path.read_text()) | {"kernels": ["skinny"]})
    ),
    "plans of an object": lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"plans": {"0": 1}})),
    "tiles that do not compile": lambda path: path.write_text(
        path.read_text().replace('"block_n": 64', '"block_n": 16384')
    ),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a file of no end": lambda path: os.truncate(path, 1 << 40),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", BAD)
def test_bad_files(what, good, caplog):
    BAD[what](good)
    for _ in range(2):
        assert all(dispatch.find_plan(key) in (PLAN, heuristic_plan(key)) for key in KEYS)
    cache.forget()
    caplog.clear()
    dispatch.find_plan(KEYS[0]), dispatch.find_plan(KEYS[1])
    (record,) = caplog.records
    assert "hf-fused-mlp tune" in record.getMessage() and len(record.getMessage()) < 1000
    try:
        cache.save([TunedPlan(KEYS[0], PLAN, 1.0, 2.0)], H100)
    except (OSError, RuntimeError):  # what `tune` ends with in one line
        pass
    else:
        assert dispatch.find_plan(KEYS[0]) == PLAN


def test_a_loop_that_takes_minutes_to_compile(plan_cache, caplog):
    """Some kernels unroll theirs: a step of one element makes thousands."""
    key = replace(KEYS[0], m=1, hidden=8192)
    plan = Plan(TileConfig("gemv", block_k=1), TORCH)
    cache.save([TunedPlan(key, plan, 1.0, 2.0)], H100)
    assert dispatch.find_plan(key) == heuristic_plan(key)
    assert "block_k 1 is too small for the unrolled loop of gemv" in caplog.text


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_a_new_file_has_the_umasks_mode_and_an_old_one_its_own(plan_cache, mask, mode):
    before = os.umask(mask)
    try:
        path = cache.save([], H100)
        assert path.stat().st_mode & 0o777 == mode
        for kept in (0o640, 0o600, 0o664):
            path.chmod(kept)
            cache.save([TunedPlan(KEYS[0], PLAN, 1.0, 2.0)], H100)
            assert path.stat().st_mode & 0o777 == kept
    finally:
        os.umask(before)


def test_a_link_stays_a_link(plan_cache, tmp_path):
    path = cache.user_file(H100)
    path.parent.mkdir(parents=True)
    target = tmp_path / "elsewhere.json"
    path.symlink_to(target)
    for _ in range(2):
        cache.save([TunedPlan(KEYS[0], PLAN, 1.0, 2.0)], H100)
        assert path.is_symlink() and read(target, H100)
