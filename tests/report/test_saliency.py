"""Maps of tokens: a page and a picture with every token, its weight and its set."""

from __future__ import annotations

import re

import pytest

from reftune.report.saliency import COLUMNS, TokenMap, _lines, write_maps

pytestmark = pytest.mark.quick

TEXTS = ["So", " <b>", " & 1", "$x$", "\n", ""]
RIGHT = TokenMap(
    "r1", [0, 1, 2, 3, 4, 5], [2.0, 0.5, 0, 1, 1, 0.25], [True] + [False] * 5, [False] * 6
)
WRONG = TokenMap("w<2>", [0, 1], [1.6, 0.0], [True, False], [False, True], "U")


def pieces(ids):
    return [TEXTS[i] for i in ids]


def test_a_page_and_a_picture_are_written(tmp_path):
    from matplotlib.image import imread

    page, picture = write_maps(tmp_path / "plots", [RIGHT, WRONG], pieces)
    text = page.read_text("utf-8")
    assert "r1: right, 1 of 6 tokens in S" in text
    assert "w&lt;2&gt;: judged wrong, 1 of 2 tokens in U" in text
    spans = re.findall(r'<span class="(\w*)" title="([\d.]+)" style="([^"]+)">([^<]*)</span>', text)
    assert [s[3] for s in spans] == [
        "So",
        " &lt;b&gt;",
        " &amp; 1",
        "$x$",
        "↵",
        "∅",
        "So",
        " &lt;b&gt;",
    ]
    assert [s[0] for s in spans] == ["marked", "", "", "", "", "", "marked", "near"]
    assert [s[1] for s in spans][:2] == ["2.000", "0.500"]
    assert "rgba(0, 114, 178, 0.60)" in spans[0][2], "learned, as strong as it gets"
    assert "rgba(213, 94, 0, 0.48)" in spans[6][2], "trained away"
    assert "rgba(0, 114, 178, 0.00)" in spans[7][2]
    assert "<script" not in text and "http" not in text
    pixels = imread(picture)
    assert picture.name == "saliency.png" and pixels.shape[0] > 150
    orange = (abs(pixels[..., :3] - (0.92, 0.70, 0.52)).max(-1) < 0.08).sum()
    assert orange > 100, "the token that is trained away is orange"


def test_nothing_is_written_of_nothing(tmp_path):
    assert write_maps(tmp_path / "plots", [], pieces) == []
    assert not (tmp_path / "plots").exists()


def test_lines_are_full_and_lose_no_token():
    texts = ["word"] * 60 + ["x" * (COLUMNS + 7)] + ["end"]
    lines = _lines(texts)
    assert [text for line in lines for _, _, text in line] == texts
    assert [index for line in lines for index, _, _ in line] == list(range(62))
    ends = [line[-1][1] + len(line[-1][2]) for line in lines]
    assert ends[:2] == [96, 96] and max(ends) == COLUMNS + 7
    assert all(line[0][1] == 0 for line in lines)
