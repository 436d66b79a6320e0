"""Reading an audit's page back."""

import json
from html.parser import HTMLParser

import pytest

from hf_fused_mlp.profiling.page import BAR_WIDTH

UNITS = {"": 1, "x": 1, " %": 0.01, " us": 1, " ms": 1e3, " s": 1e6}


class Page(HTMLParser):
    """The numbers of a page, by their path in the JSON; the JSON; and the bars' widths."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.bars, self.loads, self.json, self.inside = [], [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "data":
            self.numbers.append([attributes["data-path"], attributes["value"], ""])
        if tag == "rect" and attributes["class"] == "part":
            self.bars.append((attributes["data-form"], float(attributes["width"])))
        self.inside = "json" if attributes.get("id") == "report" else tag

    def handle_data(self, data):
        if self.inside == "data":
            self.numbers[-1][2] += data
        if self.inside == "json":
            self.json += data

    def handle_endtag(self, tag):
        self.inside = None


def check_page(text, document):
    """Every number shown is, in its unit, that of the JSON; and there are all that people look for."""
    read = Page(text)
    assert json.loads(read.json) == document
    assert read.loads == []
    for path, value, words in read.numbers:
        expected = document
        for key in path.split("."):
            expected = expected[int(key) if key.isdigit() else key]
        assert value == str(expected)
        if isinstance(expected, str):
            assert words == expected
        else:
            number = words.strip("$x %mus").replace(",", "")
            unit = words[len(words.rstrip("x %mus")) :]
            assert float(number) * UNITS[unit] == pytest.approx(expected, rel=1e-9)
    paths = {path for path, *_ in read.numbers}
    for i, phase in enumerate(document["phases"]):
        assert {f"phases.{i}.measured_gain", f"phases.{i}.gain_limit", f"phases.{i}.bound"} <= paths
        assert (f"phases.{i}.predicted.gain" in paths) == (phase["predicted"]["gain"] is not None)
        for form in ("original", "fused"):
            numbers = {key for key, value in phase[form].items() if isinstance(value, (int, float))}
            assert {f"phases.{i}.{form}.{key}" for key in numbers - {"mlp_host_share"}} <= paths
            widths = [width for owner, width in read.bars if owner == f"phases.{i}.{form}"]
            longest = max(phase[name]["wall_us"] for name in ("original", "fused"))
            assert sum(widths) == pytest.approx(BAR_WIDTH * phase[form]["wall_us"] / longest, abs=0.1)
            assert widths[0] == pytest.approx(sum(widths) * phase[form]["mlp_wall_share"], abs=0.1)
