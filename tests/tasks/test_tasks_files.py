from __future__ import annotations

import gzip
import json

import pytest
from task_lookalikes import write_rows

from reftune.errors import DataError
from reftune.tasks.files import LINE, read_rows, text, value

pytestmark = pytest.mark.quick
ROWS = [{"a": 1, "b": "x, y"}, {"a": 2, "b": 'a "quote"\nline'}]


def plain(rows):
    return [{key: item for key, item in row.items() if key != LINE} for row in rows]


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_json_lines(tmp_path, name):
    rows = read_rows(write_rows(tmp_path / name, ROWS))
    assert plain(rows) == ROWS
    assert [row[LINE] for row in rows] == [1, 2]


def test_json_array_and_wrapped_array(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(ROWS))
    assert plain(read_rows(path)) == ROWS
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert plain(read_rows(path)) == ROWS


def test_csv_with_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('a,b\n1,"x, y"\n2,"a ""quote""\nline"\n', encoding="utf-8-sig")
    rows = read_rows(path)
    assert plain(rows) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": 'a "quote"\nline'}]


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert plain(read_rows(path)) == ROWS


def test_blank_lines_are_skipped_and_line_numbers_stay_true(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row[LINE] for row in read_rows(path)] == [1, 3]


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"a": 2\n')
    with pytest.raises(DataError, match=r"r\.jsonl, line 2: malformed JSON.*one complete JSON"):
        read_rows(path)


def test_a_row_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("[1, 2]\n")
    with pytest.raises(DataError, match=r"line 1: a row must be a JSON object"):
        read_rows(path)


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=r"is empty.*at least one row"):
        read_rows(tmp_path / name)


def test_a_csv_with_header_only_is_empty(tmp_path):
    (tmp_path / "r.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="is empty"):
        read_rows(tmp_path / "r.csv")


@pytest.mark.parametrize(("row", "word"), [("1,2,3", "more"), ("1", "fewer")])
def test_a_csv_row_of_another_width_is_named(tmp_path, row, word):
    (tmp_path / "r.csv").write_text(f"a,b\n1,2\n{row}\n")
    with pytest.raises(DataError, match=f"line 3: this row has {word} fields"):
        read_rows(tmp_path / "r.csv")


def test_a_missing_file_names_its_neighbour(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r'No file.*Did you mean "train.jsonl"'):
        read_rows(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match=r"folder .* does not exist either"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")


def test_an_unknown_format_is_refused(tmp_path):
    (tmp_path / "r.txt").write_text("x")
    with pytest.raises(DataError, match=r"format of \"r.txt\".*\.jsonl"):
        read_rows(tmp_path / "r.txt")


def test_broken_compression_and_encoding_are_reported(tmp_path):
    (tmp_path / "r.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"cannot be read.*gzipped"):
        read_rows(tmp_path / "r.jsonl.gz")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 500)[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "c.jsonl.gz")
    (tmp_path / "r.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"cannot be read.*UTF-8"):
        read_rows(tmp_path / "r.jsonl")


def test_json_lines_under_a_json_name_get_a_hint(tmp_path):
    (tmp_path / "r.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"name it \.jsonl"):
        read_rows(tmp_path / "r.json")


def test_a_broken_parquet_file_is_reported(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "r.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no parquet file"):
        read_rows(tmp_path / "r.parquet")


def test_a_missing_field_names_the_nearest_one():
    with pytest.raises(DataError, match=r'x.jsonl, line 4: no field "promt".*"prompt"'):
        value({"prompt": "", LINE: 4}, "promt", "x.jsonl")


def test_text_writes_values_out_but_not_null():
    row = {"a": 7, "b": "", "c": None, LINE: 3}
    assert (text(row, "a", "x.csv"), text(row, "b", "x.csv")) == ("7", "")
    with pytest.raises(DataError, match=r'x.csv, line 3: the field "c" is null.*Fill it in'):
        text(row, "c", "x.csv")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": "\\ud800"}', "half a character"),
        ('{"a": ' + "9" * 5000 + "}", "a number that cannot be read"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_json_that_nothing_can_use_is_named(tmp_path, name, text, says):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        read_rows(path)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert plain(read_rows(path)) == [{"a": "\U0001f600"}]


def test_a_folder_and_a_broken_link_are_called_by_name(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path / "d.jsonl")
    for name, target in (("loop.jsonl", "loop.jsonl"), ("gone.jsonl", "nowhere")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(DataError, match="link to nothing, or to itself"):
            read_rows(tmp_path / name)


def test_doubled_columns_are_refused(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("question,answer,answer\n1,2,3\n")
    with pytest.raises(DataError, match="'answer' stands there twice"):
        read_rows(path)
