# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import kstest

from pyro_lvebm.data import (
    Frame,
    Table,
    dequantise_logit,
    load_digits_data,
    logit_to_levels,
    read_observations,
    read_table,
    split,
)
from pyro_lvebm.data.observations import SQUEEZE
from pyro_lvebm.data.repeats import check_repeats, dequantise, find_repeats, resolution

FUZZ = settings(max_examples=60, deadline=None)
FALSE_ALARM = 1e-6
X = np.array([[1.5, -2.0], [3.0, 4.0], [0.0, 1e-3]])


def write_csv(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


# --- reading


@pytest.mark.parametrize(
    "text",
    [
        "1.5,-2\n3,4\n0,1e-3\n",
        "left,right\n1.5,-2\n3,4\n0,1e-3\n",
        "# left,right\r\n1.5,-2\r\n3,4\r\n0,1e-3\r\n",
        "\ufeffleft,right\n1.5,-2\n3,4\n0,1e-3",
        '"left","a, b"\n"1.5",-2\n\n 3 , 4\n0,0.001\n\n',
        "year,2020\n1.5,-2\n3,4\n0,1e-3\n",
        ",\n1.5,-2\n3,4\n0,1e-3\n",
        "NA,nA\n1.5,-2\n3,4\n0,1e-3\n",
    ],
)
def test_reads_csv_with_and_without_header(tmp_path: Path, text: str) -> None:
    x = read_observations(write_csv(tmp_path / "x.csv", text))
    assert x.dtype == np.float64
    np.testing.assert_array_equal(x, X)


def test_reads_one_cell_and_a_suffix_in_capitals(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_observations(write_csv(tmp_path / "x.CSV", "7")), [[7.0]])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint64", "longdouble"])
def test_reads_numeric_arrays(tmp_path: Path, dtype: str) -> None:
    x = np.arange(6).reshape(3, 2).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "any.npz", some_name=x)
    np.savez_compressed(tmp_path / "many.npz", x=x, labels=np.array(["a", "b"]))
    for name in ("x.npy", "any.npz", "many.npz"):
        read = read_observations(tmp_path / name)
        assert read.dtype == np.float64
        np.testing.assert_array_equal(read, x)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("a,b\n", "a header and no rows"),
        ("1,2\n3,4,5\n", "Expected 2 fields in line 2, saw 3"),
        ("1,2\n3\n4,5\n", "row 2 has 1 of 2 cells; a row that is too short"),
        ("a,b\n1,\n", "column b hold no number"),
        ("a,b\n1,2\n3,dog\n", r"row 3, column 2 \(b\) holds 'dog'.*--drop b"),
        ("1,2\nnan,inf\n", "row 2, column 2 holds 'inf'.* 1 of 2 cells"),
        ("1,2\n3,-inf\n", "row 2, column 2 holds '-inf'"),
        ("a,b\n1,1e999\n", r"row 2, column 2 \(b\) holds '1e999'"),
        ("a\n2020_01\n", r"row 2, column 1 \(a\) holds '2020_01'"),
        ("a\n1+2j\n", r"row 2, column 1 \(a\) holds"),
        ("a\nTrue\n", r"row 2, column 1 \(a\) holds 'True'"),
        ("1;2\n3;4\n", "holds '3;4'.*Semicolons seem to separate columns: give --sep ';'"),
        ("a;b\n1,5;2,5\n", "not a table: .*give --sep ';' --decimal ','"),
        ("a\tb\n1,5\t2\n", "not a table: .*--decimal ','"),
        ('"1,5"\n"2,5"\n', "Commas seem to mark decimals: give --decimal ','"),
        ('1,2\n"3,4\n', "not a table: .*EOF inside string"),
        ("1,2\n3,4\x00\n", "row 2, column 2 holds"),
        (",".join(["1.5"] * 100_000) + "\n", "has 100000 columns; at most 1000 are fitted"),
        ("a\n" + "y" * 1000 + "\n", "holds '" + "y" * 40 + "';"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"x\.csv: .*{message}"):
        read_observations(write_csv(tmp_path / "x.csv", text))


def test_csv_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("größe\n1\n".encode("utf-16"))
    table = read_table(path)
    assert table.names == ("größe",) and "the text is UTF-16" in table.notes
    path.write_bytes("größe\n1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.csv: not UTF-8 text .*--encoding latin-1"):
        read_observations(path)
    assert read_table(path, Frame(encoding="latin-1")).names == ("größe",)


@pytest.mark.parametrize("suffix", [".csv", ".npy"])
def test_file_that_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_text("1\n")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr("numpy.load", refuse)
    with pytest.raises(ValueError, match=rf"x\{suffix}: cannot be read.*Permission denied"):
        read_observations(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"shape \(3,\); expected \(N, D\).*reshape\(-1, 1\)"),
        (np.array(1.0), r"shape \(\); expected \(N, D\)"),
        (np.zeros((2, 2, 2)), r"shape \(2, 2, 2\); expected \(N, D\), one row an observation$"),
        (np.zeros((0, 2)), r"is empty: shape \(0, 2\)"),
        (np.zeros((2, 0)), r"is empty: shape \(2, 0\)"),
        (
            np.array([[1.0, 2.0], [np.nan, np.inf]]),
            "1 of 4 values are infinite, first at row 1, column 1",
        ),
        (np.array([[1.0, -np.inf]]), "1 of 2 values .* first at row 0, column 1"),
        (np.zeros((2, 2), complex), "type complex128"),
        (np.zeros((2, 2), bool), "type bool"),
        (np.array([["a"]]), "type <U1"),
        (np.array([[b"a"]]), r"type \|S1"),
        (np.zeros((2, 2), "datetime64[s]"), "type datetime64"),
        (np.zeros((2, 2), [("a", float)]), r"type \[\("),
    ],
)
def test_bad_arrays(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array)
    for suffix in ("npy", "npz"):
        with pytest.raises(ValueError, match=rf"x\.{suffix}: .*{message}"):
            read_observations(tmp_path / f"x.{suffix}")


@pytest.mark.skipif(
    np.finfo(np.longdouble).max == np.finfo(np.float64).max, reason="no extended floats here"
)
def test_number_too_large_for_float64(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((1, 1), np.finfo(np.longdouble).max))
    with pytest.raises(ValueError, match="1 of 1 values are infinite"):
        read_observations(tmp_path / "x.npy")


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_pickles_are_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    array = np.array([[Bomb(mark)]], dtype=object)
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=array)
    for suffix in ("npy", "npz"):
        with pytest.raises(ValueError, match=rf"x\.{suffix}: .*pickled objects are not read"):
            read_observations(tmp_path / f"x.{suffix}")
    assert not mark.exists()
    np.load(tmp_path / "x.npy", allow_pickle=True)
    assert mark.exists()  # so the file could have done it


def test_archives_without_a_clear_choice(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"none\.npz: .*holds 0 arrays"):
        read_observations(tmp_path / "none.npz")
    np.savez(tmp_path / "two.npz", a=X, b=X)
    with pytest.raises(ValueError, match=r"two\.npz: holds 2 arrays \(a, b\).* one named x"):
        read_observations(tmp_path / "two.npz")
    np.savez(tmp_path / "six.npz", *[X] * 6)
    with pytest.raises(ValueError, match=r"holds 6 arrays \(arr_0, .*arr_4, \.\.\.\)"):
        read_observations(tmp_path / "six.npz")


def test_archive_whose_x_is_no_array(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x", b"not an array")
    with pytest.raises(ValueError, match=r"x\.npz: has no array"):
        read_observations(tmp_path / "x.npz")


def test_missing_file_folder_and_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.csv: no such file"):
        read_observations(tmp_path / "gone.csv")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match=r"folder\.npy: no such file"):
        read_observations(tmp_path / "folder.npy")
    with pytest.raises(ValueError, match=r"suffix '\.xlsx'; expected \.csv, \.tsv, \.npy or "):
        read_observations(tmp_path / "x.xlsx")
    with pytest.raises(ValueError, match="suffix ''"):
        read_observations(tmp_path / "x")


def read_or_refuse(name: str, content: bytes) -> None:
    """Whatever a file holds, reading it gives a finite table or a ValueError naming the file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        try:
            x = read_table(path).values
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert x.dtype == np.float64 and x.ndim == 2 and x.size > 0 and not np.isinf(x).any()


@FUZZ
@given(st.text(alphabet="0123456789.,-+eEnaif_ \"'#;\t\r\n\0é", max_size=60))
def test_fuzz_csv_text(text: str) -> None:
    read_or_refuse("x.csv", text.encode())


@FUZZ
@given(st.binary(max_size=60))
def test_fuzz_bytes(content: bytes) -> None:
    for name in ("x.csv", "x.npy", "x.npz"):
        read_or_refuse(name, content)


def saved(archive: bool) -> bytes:
    buffer = io.BytesIO()
    if archive:
        np.savez_compressed(buffer, x=X)
    else:
        np.save(buffer, X)
    return buffer.getvalue()


@FUZZ
@given(st.booleans(), st.data())
def test_fuzz_damaged_arrays(archive: bool, data: st.DataObject) -> None:
    content = bytearray(saved(archive))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(len(content) // 2, len(content)))
    read_or_refuse("x.npz" if archive else "x.npy", bytes(content[:end]))


@FUZZ
@given(
    arrays(
        np.float64,
        array_shapes(min_dims=2, max_dims=2, max_side=5),
        elements=st.floats(allow_nan=False, allow_infinity=False),
    ),
    st.booleans(),
)
def test_csv_round_trip_is_exact(x: np.ndarray, header: bool) -> None:
    rows = [",".join(repr(float(cell)) for cell in row) for row in x]
    if header:
        rows.insert(0, ",".join(f"column {i}" for i in range(x.shape[1])))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.csv"
        path.write_text("\n".join(rows))
        frame = Frame(header=header, index="none")
        np.testing.assert_array_equal(read_table(path, frame).values, x)


@pytest.mark.parametrize(
    ("text", "message", "told"),
    [
        (
            ",,a,b\n1,1,0.5,2\n1,2,3,4\n2,1,5,6.5\n",
            "first 2 columns have no names .*an index of 2 levels.*--index 1 --drop 2 .*--drop 1,2",
            Frame(drop=("1", "2")),
        ),
        (
            ",Unnamed: 0,Unnamed: 0.1,a,b\n0,0,0,0.5,2\n1,1,1,3,4\n2,2,2,5,6.5\n",
            "first 3 columns have no names .*saved twice.*--index 1 --drop 2,3 ",
            Frame(index="1", drop=("2", "3")),
        ),
        (
            "# made by hand, in 2020, twice\na,b\n0.5,2\n# a pause\n3,4\n5,6.5\n",
            r"lines \(1, 4\) begin with '#', the first being '# made by hand.*--comment '#'",
            Frame(comment="#"),
        ),
        (
            "a,b\n0.5,2\n%7,8\n3,4\n5,6.5\n",
            r"lines \(3\) begin with '%', the first being '%7,8'",
            Frame(comment="%"),
        ),
        (
            '#7,8\na,b\n0.5,2\n"3",4\n5,6.5\n',
            r"lines \(1\) begin with '#'",
            Frame(comment="#"),
        ),
    ],
)
def test_what_others_write_is_named_with_the_option_that_reads_it(
    tmp_path: Path, text: str, message: str, told: Frame
) -> None:
    path = write_csv(tmp_path / "x.csv", text)
    with pytest.raises(ValueError, match=rf"x\.csv: .*{message}"):
        read_table(path)
    table = read_table(path, told)
    assert table.names == ("a", "b")
    assert table.values.tolist() == [[0.5, 2.0], [3.0, 4.0], [5.0, 6.5]]
    assert told.comment is None or "begin with" in " ".join(table.notes)


@pytest.mark.parametrize(
    ("cells", "message", "told", "sep"),
    [
        ('"1,234.5"', "Commas seem to mark thousands: give --thousands ','$", {}, ","),
        ('"1,234"', "thousands: give --thousands ','; or decimals: give --decimal ','$", {}, ","),
        ('"-1,234,567"', "Commas seem to mark thousands: give --thousands ','$", {}, ","),
        (
            "1.234,5",
            r"Full stops seem to mark thousands: give --thousands '\.' --decimal ','$",
            {"decimal": ","},
            ";",
        ),
        ("1'234.5", 'Apostrophes seem to mark thousands: give --thousands "\'"$', {}, ","),
        ("1 234.5", "Spaces seem to mark thousands: give --thousands ' '$", {}, ","),
        (
            "1\xa0234,5",
            "Spaces that do not break seem to mark thousands: .* --decimal ','$",
            {"decimal": ","},
            ";",
        ),
    ],
)
def test_marks_between_thousands(
    tmp_path: Path, cells: str, message: str, told: dict[str, Any], sep: str
) -> None:
    few = "".join(f"{k}{sep}{k}\n" for k in range(30))
    path = write_csv(tmp_path / "x.csv", f"a{sep}b\n{few}{cells}{sep}7\n")
    with pytest.raises(ValueError, match=rf"row 32, column 1 \(a\) .* 1 of 31 .*{message}"):
        read_table(path, Frame(sep=sep))
    bare = cells.strip('"')
    mark = next(c for c in bare.lstrip("-") if not c.isdigit())
    table = read_table(path, Frame(sep=sep, thousands=mark, **told))
    expected = float(bare.replace(mark, "").replace(told.get("decimal", "."), "."))
    assert table.values[-1].tolist() == [expected, 7.0]


def test_what_is_no_group_of_three_is_no_thousand(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", 'a,b\n1,2\n"1,23",4\n')
    with pytest.raises(ValueError, match="holds '1,23'"):
        read_table(path, Frame(thousands=","))
    with pytest.raises(ValueError, match="thousands and decimal are both"):
        Frame(thousands=".")
    with pytest.raises(ValueError, match="comment is empty"):
        Frame(comment="")
    with pytest.raises(ValueError, match="every line begins with 'a'"):
        read_table(write_csv(tmp_path / "y.csv", "a,b\na,c\n"), Frame(comment="a"))


def test_labels_may_begin_with_a_mark(tmp_path: Path) -> None:
    table = read_table(write_csv(tmp_path / "x.csv", "id,a\n#1,0.5\n#2,1.5\n"))
    assert table.labels == ("#1", "#2") and table.names == ("a",)
    path = write_csv(tmp_path / "y.csv", "id,a\n#1,0.5\n2b,1.5\n")
    with pytest.raises(ValueError, match="--comment none"):
        read_table(path)
    assert read_table(path, Frame(comment="none")).labels == ("#1", "2b")


def test_columns_that_number_rows_are_said(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(30)
    path = tmp_path / "x.csv"
    named = pd.DataFrame(NOISE, columns=["a", "b"]).assign(**{"Row": order + 1})
    named[["Row", "a", "b"]].to_csv(path, index=False)
    with pytest.warns(UserWarning, match=r"column 'Row' labels the rows and is left out.*index="):
        assert read_observations(path).shape == (30, 2)
    named.rename(columns={"Row": "patient"}).to_csv(path, index=False)
    with pytest.warns(UserWarning, match="column 'patient' numbers the rows and is taken as a dim"):
        assert read_observations(path).shape == (30, 3)
    table = read_table(path)
    assert "patient numbers the rows" in " ".join(table.notes) and table.label_name is None
    assert read_table(path, Frame(index="patient")).label_name == "patient"


# --- the frame of a table

NOISE = np.random.default_rng(0).normal(size=(30, 2))


@pytest.mark.parametrize(
    ("frame", "options", "names", "labels"),
    [
        (pd.DataFrame(NOISE, columns=["a", "b"]), {}, ("a", "b"), ("0", "29")),
        (pd.DataFrame(NOISE), {"index": False}, ("0", "1"), None),
        (pd.DataFrame(NOISE), {}, ("0", "1"), ("0", "29")),
        (pd.DataFrame(NOISE, columns=[2019, 2020]), {"index": False}, ("2019", "2020"), None),
        (
            pd.DataFrame(NOISE, pd.date_range("2020-01-01", periods=30), ["a", "b"]),
            {},
            ("a", "b"),
            ("2020-01-01", "2020-01-30"),
        ),
        (pd.DataFrame(NOISE, range(40, 10, -1)), {"index_label": "id"}, ("0", "1"), ("40", "11")),
    ],
)
def test_header_and_index_of_pandas(
    tmp_path: Path,
    frame: pd.DataFrame,
    options: dict[str, Any],
    names: tuple[str, ...],
    labels: tuple[str, str] | None,
) -> None:
    path = tmp_path / "x.csv"
    frame.to_csv(path, **options)
    table = read_table(path)
    assert table.names == names
    np.testing.assert_allclose(table.values, NOISE, rtol=1e-12)
    assert "30 rows of 2 columns" in table.notes[0] and "--no-header" in table.notes[1]
    if labels is None:
        assert table.labels is None
    else:
        assert table.labels is not None and (table.labels[0], table.labels[-1]) == labels
        assert "labels the rows" in table.notes[2]


def test_the_frame_can_be_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("day;a;b;c\n3;1,5;2;x\n4;2,5;3;y\n")
    told = Frame(sep=";", decimal=",", index="day", drop=("c",))
    table = read_table(path, told)
    assert table.names == ("a", "b") and table.labels == ("3", "4")
    np.testing.assert_array_equal(table.values, [[1.5, 2.0], [2.5, 3.0]])
    only = read_table(path, Frame(sep=";", decimal=",", columns=("3", "a")))
    assert only.names == ("b", "a") and only.values.tolist() == [[2.0, 1.5], [3.0, 2.5]]
    path.write_text("0,1\n2.5,3\n")
    assert read_table(path).names == ("0", "1")
    data = read_table(path, Frame(header=False))
    assert data.values.tolist() == [[0.0, 1.0], [2.5, 3.0]] and data.names[0] == "column 1"
    path.write_text("7.5,8\n2.5,3\n")
    assert read_table(path, Frame(header=True)).names == ("7.5", "8")
    with pytest.raises(ValueError, match=r"no column 'z'; columns are 7\.5, 8"):
        read_table(path, Frame(header=True, drop=("z",)))
    np.save(tmp_path / "x.npy", NOISE)
    assert read_table(tmp_path / "x.npy", Frame(drop=("2",))).names == ("x[0]",)
    path.write_text("a b\n 1.5   2\n2.5 3\n")
    with pytest.raises(ValueError, match="Spaces seem to separate columns: give --sep ' '"):
        read_table(path)
    assert read_table(path, Frame(sep=" ")).values.tolist() == [[1.5, 2.0], [2.5, 3.0]]
    path.write_text("date,flag,a\n2020-01-01,True,1.5\n2020-01-02,False,2\n")
    with pytest.raises(ValueError, match=r"\(date\) holds '2020-01-01'.*--index date"):
        read_table(path)
    with pytest.raises(ValueError, match=r"\(flag\) holds 'True'.*--drop flag"):
        read_table(path, Frame(index="date"))
    table = read_table(path, Frame(index="date", drop=("flag",)))
    assert table.names == ("a",) and table.labels == ("2020-01-01", "2020-01-02")
    with pytest.raises(ValueError, match="must differ"):
        Frame(sep=",", decimal=",")


def test_missing_cells_are_nan_and_said(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1.5,NA\n,2.5\n,?\n3,4\n")
    table = read_table(path)
    np.testing.assert_array_equal(table.values, [[1.5, np.nan], [np.nan, 2.5], [3, 4]])
    assert table.rows.tolist() == [1, 2, 4]
    assert "1 rows hold no number at all and are left out" in table.notes
    assert "2 cells are missing: a 1, b 1" in table.notes


def repeated(rng: np.random.Generator) -> dict[str, np.ndarray]:
    smooth = rng.normal(size=400)
    return {
        "sales": smooth,
        "quarter": rng.integers(1, 5, 400).astype(float),
        "sex": rng.integers(0, 2, 400).astype(float),
        "rain": np.where(rng.random(400) < 0.4, 0.0, np.exp(smooth)),
        "height": np.round(170 + 7 * smooth),
        "weight": np.round(70 + 7 * smooth, 1),
    }


def test_values_that_repeat_are_named() -> None:
    columns = repeated(np.random.default_rng(0))
    table = Table(np.stack(list(columns.values()), 1), tuple(columns), np.arange(400))
    found = {r.name: r for r in find_repeats(table)}
    assert [name for name, r in found.items() if r.severe] == ["quarter", "sex", "rain", "height"]
    assert "takes 4 values only, whole numbers" in found["quarter"].what
    assert "is 0 in" in found["rain"].what and not found["weight"].severe
    with pytest.raises(ValueError, match=r"quarter.*--dequantise 'quarter,sex,rain,height'"):
        check_repeats(table)
    with pytest.warns(UserWarning, match="column weight takes .* as by rounding"):
        check_repeats(table.select(["sales", "weight"]))
    smooth = table.select(["sales"])
    check_repeats(smooth)
    with pytest.warns(UserWarning, match="5 of 405 rows are copies"):
        check_repeats(smooth.take(np.r_[:400, :5]))


def test_read_observations_warns_of_them(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    columns = repeated(np.random.default_rng(1))
    pd.DataFrame({k: columns[k] for k in ("sales", "quarter")}).to_csv(path, index=False)
    with pytest.warns(UserWarning, match="column quarter takes 4 values"):
        assert read_observations(path).shape == (400, 2)


def test_dequantise_spreads_over_the_grid() -> None:
    columns = repeated(np.random.default_rng(2))
    values = np.stack([columns["weight"], columns["sales"], columns["quarter"]], 1)
    steps = np.array([resolution(values[:, 0]), 0.0, resolution(values[:, 2])])
    np.testing.assert_allclose(steps, [0.1, 0.0, 1.0], rtol=1e-9)
    spread = dequantise(values, steps, seed=3)
    assert (np.abs(spread - values) <= steps / 2 + 1e-12).all()
    assert kstest((spread - values)[:, 2] + 0.5, "uniform").pvalue > FALSE_ALARM
    assert not find_repeats(Table(spread, ("w", "s", "q"), np.arange(400)))
    assert resolution(np.array([0.7, 0.0, 0.2, np.nan, 0.2])) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="lie on no grid"):
        resolution(columns["rain"])


# --- splitting


def test_split_is_a_partition_fixed_by_the_seed() -> None:
    x = np.arange(200.0).reshape(100, 2)
    train, test = split(x, 0.07, seed=3)
    assert train.shape == (93, 2) and test.shape == (7, 2)
    both = np.concatenate([train, test])
    np.testing.assert_array_equal(both[np.argsort(both[:, 0])], x)
    for a, b in zip(split(x, 0.07, seed=3), (train, test), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(split(x, 0.07, seed=4)[1], test)
    train[:] = -1.0
    assert x.min() == 0.0


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_split_rejects_the_fraction(held_out: float) -> None:
    with pytest.raises(ValueError, match=r"held_out is .*between 0 and 1"):
        split(X, held_out, seed=0)


def test_split_rejects_empty_parts() -> None:
    with pytest.raises(ValueError, match="of 3 rows leaves 0 rows for training and 3 held out"):
        split(X, 0.9, seed=0)
    with pytest.raises(ValueError, match="of 0 rows leaves 0 rows"):
        split(X[:0], 0.5, seed=0)


# --- the logit transform


@FUZZ
@given(
    st.integers(2, 300).flatmap(
        lambda k: st.tuples(
            st.just(k), arrays(np.int64, array_shapes(max_side=4), elements=st.integers(0, k - 1))
        )
    ),
    st.integers(0, 2**32),
)
def test_dequantise_and_back(levels: tuple[int, np.ndarray], seed: int) -> None:
    num_levels, x = levels
    y = dequantise_logit(x.astype(float), num_levels, seed)
    assert y.shape == x.shape and y.dtype == np.float64 and np.isfinite(y).all()
    np.testing.assert_array_equal(y, dequantise_logit(x, num_levels, seed))
    back = logit_to_levels(y, num_levels)
    assert (back >= x - 1e-9).all() and (back <= x + 1 + 1e-9).all()


def test_extreme_noise_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extreme:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self, shape: tuple[int, ...]) -> np.ndarray:
            return np.full(shape, self.value)

    edge = math.log((1 - SQUEEZE) / SQUEEZE)
    for level, noise, sign in ((0, 0.0, -1), (16, np.nextafter(1.0, 0.0), 1)):
        monkeypatch.setattr("numpy.random.default_rng", lambda _, noise=noise: Extreme(noise))
        y = dequantise_logit(np.array([[level]]), 17, seed=0)
        assert y.item() == pytest.approx(sign * edge, rel=1e-9)


def density_of_y(y: np.ndarray) -> np.ndarray:
    """Density of y where every level is equally likely, so that u is uniform on (0, 1)."""
    v = expit(y)
    inside = (v >= SQUEEZE) & (v <= 1 - SQUEEZE)
    return np.where(inside, v * (1 - v) / (1 - 2 * SQUEEZE), 0.0)


def test_change_of_variables() -> None:
    # The documented dy/du is that of the code: numerical derivative of u(y) = logit_to_levels / K.
    y, h = np.linspace(-12.0, 12.0, 97), 1e-4
    du_dy = (logit_to_levels(y + h, 5) - logit_to_levels(y - h, 5)) / (2 * h * 5)
    np.testing.assert_allclose(du_dy, density_of_y(y), rtol=1e-6)
    # So p(u) = 1 becomes a density of y whose integral is 1.
    edge = math.log((1 - SQUEEZE) / SQUEEZE)
    assert quad(density_of_y, -edge, edge, epsabs=1e-12)[0] == pytest.approx(1.0, abs=1e-9)


def distribution_of_y(y: np.ndarray) -> np.ndarray:
    return np.clip((expit(y) - SQUEEZE) / (1 - 2 * SQUEEZE), 0.0, 1.0)


def test_law_of_y() -> None:
    x = np.random.default_rng(0).integers(0, 17, size=20_000)
    y = dequantise_logit(x, 17, seed=1)
    assert kstest(y, distribution_of_y).pvalue > FALSE_ALARM
    # Broken siblings: no noise, and noise of the wrong width.
    still = (np.floor(logit_to_levels(y, 17)) + 0.5) / 17
    wide = (x + 2 * np.random.default_rng(1).random(x.shape)) / 18
    for u in (still, wide):
        v = SQUEEZE + (1 - 2 * SQUEEZE) * u
        assert kstest(np.log(v / (1 - v)), distribution_of_y).pvalue < FALSE_ALARM


def test_noise_depends_on_the_seed_and_leaves_the_global_generator() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    x = np.zeros((4, 2))
    assert not np.array_equal(dequantise_logit(x, 2, seed=0), dequantise_logit(x, 2, seed=1))
    split(x, 0.5, seed=0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            np.array([[0.0, 0.5]]),
            r"1 of 2 entries that are not integers from 0 to 3, the first 0\.5",
        ),
        (np.array([[-1, 4, 3]]), "2 of 3 entries .* the first -1"),
        (np.array([[np.nan, np.inf]]), "2 of 2 entries"),
        (np.array([[True]]), "type bool; expected integers 0 to 3"),
        (np.array([[1j]]), "type complex128"),
        (np.array([["1"]]), "type <U1"),
    ],
)
def test_dequantise_rejects(x: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantise_logit(x, 4, seed=0)


def test_number_of_levels_is_checked() -> None:
    with pytest.raises(ValueError, match="num_levels is 1; expected at least 2"):
        dequantise_logit(np.zeros((1, 1)), 1, seed=0)
    with pytest.raises(ValueError, match="num_levels is 0; expected at least 2"):
        logit_to_levels(np.zeros((1, 1)), 0)


def test_digits() -> None:
    digits = load_digits_data(seed=0)
    assert digits.train.shape == (1437, 64) and digits.test.shape == (360, 64)
    assert digits.image_shape == (8, 8) and digits.num_levels == 17
    levels = np.floor(logit_to_levels(np.concatenate([digits.train, digits.test]), 17))
    assert set(np.unique(levels)) == set(range(17))
    np.testing.assert_array_equal(digits.test, load_digits_data(seed=0).test)
    assert not np.array_equal(digits.test, load_digits_data(seed=1).test)
