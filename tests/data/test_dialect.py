"""Tables in text as programs write them: each is read as it was meant, or refused in one line."""

import csv
import io
import re
import warnings

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coupled_gmm as cg
from coupled_gmm.data import clouds, table_files

X = [[1.5, 2.25], [-3.0, 0.5], [0.125, 4.0]]
# What wrote it (or what it has), its text, and what it gives: (points, names), or a part of the one line.
FILES = {
    "pandas, index=False": ("x,y\n1.5,2.25\n-3.0,0.5\n0.125,4.0\n", (X, "xy")),
    "pandas": (",x,y\n0,1.5,2.25\n1,-3.0,0.5\n2,0.125,4.0\n", (X, "xy")),
    "pandas, rows chosen": (",x,y\n17,1.5,2.25\n4,-3.0,0.5\n9,0.125,4.0\n", (X, "xy")),
    "pandas, twice": (",Unnamed: 0,x,y\n0,0,1.5,2.25\n1,1,-3.0,0.5\n2,2,0.125,4.0\n", (X, "xy")),
    "pandas, array, index=False": ("0,1\n1.5,2.25\n-3.0,0.5\n0.125,4.0\n", (X, "01")),
    "pandas, array": (",0,1\n0,1.5,2.25\n1,-3.0,0.5\n2,0.125,4.0\n", (X, "01")),
    "pandas, array of integers, index=False": (
        "0,1\n5,6\n7,8\n",
        "the first line (0, 1) may hold names or a point; say",
    ),
    "pandas, header=False, index=False": ("1.5,2.25\n-3.0,0.5\n0.125,4.0\n", (X, None)),
    "pandas, header=False": ("0,1.5,2.25\n1,-3.0,0.5\n2,0.125,4.0\n", "column_1 counts the rows; name the features"),
    "pandas, sep=';', decimal=','": ("x;y\n1,5;2,25\n-3,0;0,5\n0,125;4,0\n", (X, "xy")),
    "pandas, missing values": ("x,y\n1.5,\n,0.5\n,4.0\n", "column 'x' lacks 2 of 3 values, the first in row 2; drop"),
    "pandas, to_string": ("       x     y\n0  1.500  2.25\n1 -3.000  0.50\n2  0.125  4.00\n", (X, "xy")),
    "pandas, years as labels": ("2019,2020,2021\n0.5,1.0,2.5\n", ([[0.5, 1, 2.5]], ("2019", "2020", "2021"))),
    "polars": ("x,y\n1.5,2.25\n-3.0,0.5\n0.125,4.0\n", (X, "xy")),
    "polars, with_row_index": ("index,x,y\n0,1.5,2.25\n1,-3.0,0.5\n2,0.125,4.0\n", (X, "xy")),
    "R, write.csv": ('"","x","y"\n"1",1.5,2.25\n"2",-3,0.5\n"3",0.125,4\n', (X, "xy")),
    "R, write.csv, row.names=FALSE": ('"x","y"\n1.5,2.25\n-3,0.5\n0.125,4\n', (X, "xy")),
    "R, write.csv2": ('"";"x";"y"\n"1";1,5;2,25\n"2";-3;0,5\n"3";0,125;4\n', (X, "xy")),
    "R, write.table": ('"x" "y"\n"1" 1.5 2.25\n"2" -3 0.5\n"3" 0.125 4\n', (X, "xy")),
    "R, write.table, names": ('"x" "y"\n"a b" 1.5 2.25\n"c" -3 0.5\n"d" 0.125 4\n', (X, "xy")),
    "R, NA": ('"x","y"\n1.5,NA\n-3,0.5\n0.125,NA\n', "column 'y' lacks 2 of 3 values, the first in row 1; drop"),
    "Rdatasets": ("rownames,x,y\n1,1.5,2.25\n2,-3,0.5\n3,0.125,4\n", (X, "xy")),
    "numpy, savetxt": ("1.500e+00 2.250e+00\n-3.000e+00 5.000e-01\n1.250e-01 4.000e+00\n", (X, None)),
    "numpy, savetxt, header": ("# x y\n1.500e+00 2.250e+00\n-3.000e+00 5.000e-01\n1.250e-01 4.000e+00\n", (X, "xy")),
    "numpy, savetxt, footer": ("# x,y\n1.5,2.25\n-3.0,0.5\n0.125,4.0\n# the end\n", (X, "xy")),
    "Excel, Windows": ("\ufeffx,y\r\n1.5,2.25\r\n-3,0.5\r\n0.125,4\r\n", (X, "xy")),
    "Excel, German": ("\ufeffx;y\r\n1,5;2,25\r\n-3;0,5\r\n0,125;4\r\n", (X, "xy")),
    "Excel, sep=": ("sep=;\r\nx;y\r\n1,5;2,25\r\n-3;0,5\r\n0,125;4\r\n", (X, "xy")),
    "Excel, Unicode text": ("x\ty\r\n1,5\t2,25\r\n-3\t0,5\r\n0,125\t4\r\n".encode("utf-16"), (X, "xy")),
    "Excel, UTF-16 without mark": (
        "x\ty\r\n1\t2\r\n".encode("utf-16-le"),
        "holds zero bytes, so it is no text; save it",
    ),
    "Excel, old Mac": ("x,y\r1.5,2.25\r-3,0.5\r0.125,4\r", (X, "xy")),
    "Excel, Latin-1": ("größe,y\n1,2\n".encode("latin-1"), "is not in UTF-8 (byte 2); save it again in that encoding"),
    "Excel, errors": ("x,y\n1.5,#N/A\n-3,#DIV/0!\n0.125,4\n", "column 'y' lacks 2 of 3 values, the first in row 1"),
    "Excel, empty column": ("x,y,\n1.5,2.25,\n-3,0.5,\n0.125,4,\n", (X, "xy")),
    "thousands": ('x,y\n"1,234.5",2\n"3,000,000.0",4\n', ([[1234.5, 2], [3e6, 4]], "xy")),
    "thousands, German": ("x;y\n1.234,5;2\n3.000.000,0;4\n", ([[1234.5, 2], [3e6, 4]], "xy")),
    "thousands or decimals": ("x;y\n1,234;2\n3,456;4\n", "1,234 in it may be 1.234 or 1234; write a decimal point"),
    "two decimal marks": ("x;y\n1,5;2.5\n", "both 1,5 and 1.5 stand in it; write one decimal mark"),
    "one column of decimal commas": ("x\n1,5\n2,5\n", "the header has 1 names and the rows have 2 cells"),
    "one column of decimal commas, no header": ("1,05\n2,25\n", "may be one of decimals cut at their comma; write a"),
    "two columns of whole numbers, no header": ("3,10\n7,5\n", ([[3, 10], [7, 5]], None)),
    "trailing delimiters": ("x,y\n1.5,2.25,\n-3,0.5,\n0.125,4,\n", (X, "xy")),
    "blank lines": ("\nx,y\n\n1.5,2.25\n\n-3,0.5\n0.125,4\n\n\n", (X, "xy")),
    "quoted numbers": ('"x","y"\n"1.5","2.25"\n"-3","0.5"\n"0.125","4"\n', (X, "xy")),
    "a delimiter in a name": ('"x, in mm",y\n1.5,2.25\n-3,0.5\n0.125,4\n', (X, ("x, in mm", "y"))),
    "bars": ("x|y\n1.5|2.25\n-3|0.5\n0.125|4\n", (X, "xy")),
    "a long row": ("x,y\n1,2\n1,2,3,4\n", "row 2 below the first line has 4 cells and row 1 has 2; give every row"),
    "a short row": ("x,y\n1,2\n3\n", "row 2 below the first line has 1 cells and row 1 has 2; give every row a cell"),
    "a broken quote": ('x,y\n1,"2\n', "not numeric"),
    "words": ("x,y,name\n1,2,a\n3,4,b\n", "column 'name' is not numeric (String); leave it out by naming columns"),
    "flags": ("x,flag\n1,True\n3,False\n", "column 'flag' is not numeric (String); leave it out by naming columns"),
    "dates": ("x,when\n1,2020-01-01\n3,2020-01-02\n", "column 'when' is not numeric (String)"),
    "iris.data": ("5.1,3.5,setosa\n4.9,3.0,setosa\n", "column 'column_3' is not numeric (String)"),
    "nan": ("x,y\n1,nan\n3,4\n", "column 'y' lacks 1 of 2 values, the first in row 1; drop those rows"),
    "infinity": ("x,y\n1,2\n3,-inf\n", "column 'y' is infinite in 1 of 2 values, the first in row 2; drop those rows"),
    "too large": ("x,y\n1,2\n3,1e999\n", "column 'y' is infinite in 1 of 2 values, the first in row 2"),
    "a name twice": ("x,x\n1,2\n", "2 columns are named 'x'; give each its own name"),
    "no name in between": ("x,,y\n1,2,3\n", "column 2 has no name; name it, or name the features in columns"),
    "an id": ("id,x,y\n1,1.5,2.25\n2,-3,0.5\n3,0.125,4\n", (X, "xy")),
    "nothing": ("", "the file is empty; a cloud needs at least one point"),
    "only a header": ("x,y\n", "the table has no rows; a cloud needs at least one point"),
    "only zeros and ones": (
        "0,1\n1,0\n1,1\n",
        "the first line (0, 1) may hold names or a point; say which with header",
    ),
    "counts from one": ("1,2,3\n4,5,6\n", "the first line (1, 2, 3) may hold names or a point"),
    "a point among floats": ("1,2\n3,4.5\n", ([[1, 2], [3, 4.5]], None)),
}


@pytest.mark.parametrize("name", FILES)
def test_files_as_people_have_them(tmp_path, name):
    text, expected = FILES[name]
    path = tmp_path / "c.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{re.escape(expected)}") as caught:
            clouds.read_named_cloud(path)
        assert len(str(caught.value).splitlines()) == 1
        return
    cloud = clouds.read_named_cloud(path)
    np.testing.assert_array_equal(cloud.points, expected[0])
    assert cloud.names == (None if expected[1] is None else tuple(expected[1]))


def opened(path):
    """What `open_cloud` gives of a file: points and names, or the line of its refusal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cloud = cg.open_cloud(path)
            return np.concatenate([points for points, _ in cloud.chunks()]), cloud.names
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            return str(error)


@pytest.mark.parametrize("name", FILES)
def test_files_in_pieces(tmp_path, name, monkeypatch):
    """A file of one piece is taken as it is by `read_cloud`; cut below its second row, it gives the same numbers or is refused."""
    text, expected = FILES[name]
    path = tmp_path / "c.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = opened(path)
    if isinstance(expected, str):
        assert isinstance(found, str) and found.startswith(str(path)) and re.search(re.escape(expected), found)
    else:
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1] == (None if expected[1] is None else tuple(expected[1]))
    data = path.read_bytes()
    lines = [line.end() + 1 for line in re.finditer(rb"\r\n|\r|\n", data)]
    for piece in range(lines[2] if len(lines) > 2 else len(data), len(data)):
        monkeypatch.setattr(table_files, "PIECE", piece)
        cut = opened(path)
        if not isinstance(cut, str):
            assert not isinstance(found, str), f"pieces of {piece} bytes are taken, and the whole is refused"
            np.testing.assert_array_equal(cut[0], found[0])
            assert cut[1] == found[1]


def test_the_header_key_settles_what_cannot_be_told(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("0,1\n5,6\n7,8\n")
    assert clouds.read_named_cloud(path, header=True).names == ("0", "1")
    np.testing.assert_array_equal(clouds.read_cloud(path, header=True), [[5, 6], [7, 8]])
    with pytest.warns(UserWarning, match="read as two columns of whole numbers"):
        np.testing.assert_array_equal(clouds.read_cloud(path, header=False), [[0, 1], [5, 6], [7, 8]])
    np.testing.assert_array_equal(clouds.read_weights(path, name="1", header=True), [6, 8])
    pl.DataFrame(X).write_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="header is for text files"):
        clouds.read_cloud(tmp_path / "c.parquet", header=True)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (",x\n0,1.5\n1,2.5\n", "left out the column without a name, which names the rows"),
        ("id,x\n1,1.5\n2,2.5\n", "left out 'id', which counts the rows; name it in columns if it is a feature"),
        ("cell,x\n0,1.5\n1,2.5\n2,2.5\n", "took 'cell', which counts the rows, for a feature; if it is an index, name"),
        ("0,1\n1.5,2.0\n", r"took the first line \(0, 1\) for names; if it is a point, say header = false"),
    ],
)
def test_what_was_decided_is_said(tmp_path, text, note):
    (tmp_path / "c.csv").write_text(text)
    with pytest.warns(UserWarning, match=note):
        clouds.read_cloud(tmp_path / "c.csv")


def test_an_index_is_a_feature_where_it_is_named(tmp_path):
    (tmp_path / "c.csv").write_text("id,x\n1,1.5\n2,2.5\n")
    np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "c.csv", columns=["id", "x"]), [[1, 1.5], [2, 2.5]])


def test_many_rows(tmp_path):
    """Without quotes polars reads the text, with them Python does; a short row far below is found by both."""
    x = np.random.RandomState(0).randn(20_000, 3)
    rows = [",".join(map(repr, row)) for row in x.tolist()]
    for quote in ("", '"'):
        header = ",".join(quote + name + quote for name in "xyz")
        (tmp_path / "c.csv").write_text("\n".join([header, *rows]))
        np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "c.csv"), x)
        (tmp_path / "c.csv").write_text("\n".join([header, *rows, "1,2", *rows[:3]]))
        with pytest.raises(ValueError, match="row 20001 below the first line has 2 cells and row 1 has 3"):
            clouds.read_cloud(tmp_path / "c.csv")


def written(x, names, delimiter, decimal, header, index, quoting, mark, end, form):
    """A table as text in a dialect."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=end)
    if header:
        rows.writerow(([""] if index else []) + names)
    for i, row in enumerate(x.tolist()):
        rows.writerow(([str(i)] if index else []) + [form(value).replace(".", decimal) for value in row])
    return (("\ufeff" if mark else "") + buffer.getvalue()).encode()


FORMS = [
    repr,
    "{:.3f}".format,
    "{:g}".format,
    "{:.17e}".format,
    lambda value: repr(int(value) if value == int(value) else value),
]
FLOATS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-100, 100),
    st.integers(-5, 5).map(float),
    st.integers(-99_999, 99_999).map(lambda i: i / 1000),
)


@st.composite
def tables(draw):
    d = draw(st.integers(1, 4))
    n = draw(st.integers(2, 6))
    x = np.array(draw(st.lists(st.lists(FLOATS, min_size=d, max_size=d), min_size=n, max_size=n)))
    names = draw(
        st.sampled_from([[f"f{i}" for i in range(d)], [str(i) for i in range(d)], ["c d", "a, b", "e;f", "g"][:d]])
    )
    delimiter, decimal = draw(st.sampled_from([",", ";", "\t", "|", " "])), draw(st.sampled_from([".", ","]))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    rest = (
        draw(st.booleans()),
        draw(st.booleans()),
        quoting,
        draw(st.booleans()),
        draw(st.sampled_from(["\n", "\r\n", "\r"])),
    )
    form = draw(st.sampled_from(FORMS))
    return x, names, delimiter, decimal, *rest, form


def outcome(path, table):
    """ "equal" or "refused" of a table that was written and read again; the numbers where they are others."""
    x, *_, form = table
    path.write_bytes(written(*table))
    try:
        found = clouds.read_named_cloud(path)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return "refused"
    wrote = [[float(form(value)) for value in row] for row in x.tolist()]
    return "equal" if np.array_equal(found.points, wrote) else (found, path.read_bytes())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(table=tables())
def test_any_dialect_reads_back_equal_or_is_refused(tmp_path_factory, table):
    assert outcome(tmp_path_factory.getbasetemp() / "round.csv", table) in ("equal", "refused")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(table=tables(), share=st.floats(0.3, 0.99))
def test_any_dialect_in_pieces_is_the_whole_or_refused(tmp_path_factory, table, share):
    """Rows again and again, the file cut in a few places: never other numbers than of the whole."""
    x, *rest = table
    path = tmp_path_factory.getbasetemp() / "pieces.csv"
    path.write_bytes(written(np.tile(x, (8, 1)), *rest))
    whole = opened(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_files, "PIECE", max(1, int(share * path.stat().st_size)))
        cut = opened(path)
    if not isinstance(cut, str):
        assert not isinstance(whole, str)
        np.testing.assert_array_equal(cut[0], whole[0])
        assert cut[1] == whole[1]


def test_pieces_of_every_common_dialect_are_read(tmp_path, monkeypatch):
    """Not refused: what programs write most, in pieces of ten rows, the slow way and the quick."""
    x = np.random.RandomState(0).randn(300, 3).round(6)
    frame = pl.DataFrame(x, schema=["u", "v", "w"])
    texts = {
        "comma": frame.write_csv(),
        "semicolon": frame.write_csv(separator=";"),
        "tab": frame.write_csv(separator="\t"),
    }
    texts["decimal comma"] = frame.write_csv(separator=";", decimal_comma=True)
    texts["quoted"] = frame.write_csv(quote_style="always")
    texts["index"] = frame.with_row_index("").write_csv()
    texts["end"] = "".join(f"{line};\n" for line in texts["semicolon"].splitlines())
    texts["bare"] = "".join(" ".join(map(str, row)) + "\n" for row in x.tolist())
    texts["padded"] = "".join("  ".join(f"{value:12}" for value in row) + "\n" for row in x.tolist())
    texts["comments"] = "# by hand\n" + texts["comma"] + "# the end\n\n"
    texts["blank lines"] = texts["comma"].replace("\n", "\n\n")
    texts["windows"] = texts["comma"].replace("\n", "\r\n")
    texts["no last line end"] = texts["comma"].rstrip("\n")
    for name, text in texts.items():
        for data, piece in ((text.encode(), 350), (text.encode("utf-16"), 700)):
            (tmp_path / "c.csv").write_bytes(data)
            monkeypatch.setattr(table_files, "PIECE", piece)
            found = opened(tmp_path / "c.csv")
            assert not isinstance(found, str), (name, found)
            np.testing.assert_array_equal(found[0], x, err_msg=name)
    for late, says in (
        ("1,2\n", "row 301 below the first line has 2 cells and row 1 has 3"),
        ("1,a,3\n", "column 'v' is not"),
    ):
        (tmp_path / "c.csv").write_text(texts["comma"] + late)
        assert re.search(says, opened(tmp_path / "c.csv"))
    assert re.search("'a' in row 301", opened(tmp_path / "c.csv"))
    (tmp_path / "c.csv").write_text(texts["comma"] + "1,NA,3\n")
    assert re.search(
        r"column 'v' lacks 1 of \d+ values in rows \d+ to 301, the first in row 301;", opened(tmp_path / "c.csv")
    )
    (tmp_path / "c.csv").write_bytes(texts["comma"].encode() + b"1,\xff,3\n")
    assert re.search(rf"is not in UTF-8 \(byte {len(texts['comma']) + 2}\)", opened(tmp_path / "c.csv"))


def test_what_only_later_pieces_say(tmp_path, monkeypatch):
    """A column that was empty; a cell of several lines, in a column that is not taken; one that never ends."""
    monkeypatch.setattr(table_files, "PIECE", 100)
    path = tmp_path / "c.csv"
    path.write_text("u;v;\n" + "1;2;\n" * 60)
    np.testing.assert_array_equal(opened(path)[0], [[1, 2]] * 60)
    path.write_text("u;v;\n" + "1;2;\n" * 60 + "1;2;3\n")
    assert re.search(r"the last column is empty at first, and not below row \d+; give every row a cell", opened(path))
    path.write_text("u,v,said\n" + '1,2,"a\n3,4,5\nb"\n' * 40)
    np.testing.assert_array_equal(next(cg.open_cloud(path, columns=["v", "u"]).chunks()).points, [[2, 1]] * 40)
    path.write_text("u,v,said\n" + "1,2,a\n" * 40 + '1,2,"' + "a\n" * 500)
    with pytest.raises(ValueError, match="a row is longer than 400 characters; close its quotes"):
        cg.open_cloud(path, columns=["v", "u"])
