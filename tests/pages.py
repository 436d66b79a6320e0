"""Reading an audit's page back."""

import json
from html.parser import HTMLParser

import pytest

UNITS = {"": 1, "x": 1, " %": 0.01, " us": 1, " ms": 1e3, " s": 1e6}


class Page(HTMLParser):
    """The numbers of a page, by their path in the JSON; the JSON; and the bars' widths, in percent."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.bars, self.loads, self.json, self.inside = [], [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "data":
            self.numbers.append([attributes["data-path"], attributes["value"], ""])
        if "data-form" in attributes:
            width = attributes["style"].removeprefix("width: ").rstrip("%;")
            self.bars.append((attributes["data-form"], float(width)))
        self.inside = "json" if attributes.get("id") == "report" else tag

    def handle_data(self, data):
        if self.inside == "data":
            self.numbers[-1][2] += data
        if self.inside == "json":
            self.json += data

    def handle_endtag(self, tag):
        self.inside = None


def check_page(text, document):
    """Every number shown is, in its unit, that of the JSON, rounded; and there are all that people look for."""
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
            # two significant digits or more
            assert float(number) * UNITS[unit] == pytest.approx(expected, rel=0.051)
    paths = {path for path, *_ in read.numbers}
    for i, phase in enumerate(document["phases"]):
        forms = [form for form in ("original", "fused", "fused_norms") if phase[form] is not None]
        gains = {f"phases.{i}.{gain}" for gain in ("predicted.gain", "measured_gain", "gain_limit")}
        shown = {gain for gain in gains if gain in paths}
        wanted = gains if "fused" in forms else set()
        assert shown == (wanted if phase["predicted"]["gain"] is not None else wanted - {f"phases.{i}.predicted.gain"})
        assert any(path.startswith("verdict.speedup.") for path in paths) == (len(forms) > 1)
        for form in forms:
            numbers = {key for key, value in phase[form].items() if isinstance(value, (int, float))}
            assert {f"phases.{i}.{form}.{key}" for key in numbers - {"mlp_host_share"}} <= paths
            widths = [width for owner, width in read.bars if owner == f"phases.{i}.{form}"]
            longest = max(phase[name]["wall_us"] for name in forms)
            assert sum(widths) == pytest.approx(100 * phase[form]["wall_us"] / longest, abs=0.1)
            assert widths[0] == pytest.approx(sum(widths) * phase[form]["mlp_wall_share"], abs=0.1)
