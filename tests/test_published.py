"""The carried-over numbers of the papers: whole, consistent with each other, and compared as a reader would."""

from __future__ import annotations

from statistics import fmean

import pytest

from ris_bench import published
from ris_bench.data.dataset import DATASETS
from ris_bench.errors import UserError
from ris_bench.layout import METRICS
from ris_bench.published import agreement
from ris_bench.records import Choice

TABLES = published.load().tables


def number(cell: published.Cell) -> float | None:
    return None if cell.text == "-" else float(cell.text.rstrip("KM").rstrip("+"))


@pytest.mark.parametrize(
    "name, rows, columns, numbers, total",
    [
        # Sums over all numbers of a table: a slip of one digit anywhere changes them.
        ("etris_pet_r101", 8, 4, 32, 876.3),
        ("etris_parameters", 9, 3, 25, 1892.92),
        ("etris_main", 20, 10, 167, 9328.39),
        ("etris_bridger_scope", 6, 2, 12, 429.24),
        ("etris_modules", 4, 4, 16, 852.17),
        ("detris_main_miou", 19, 10, 165, 11260.2),
        ("detris_main_oiou", 3, 10, 29, 2059.9),
        ("detris_pet_dinov2", 8, 5, 40, 2492.89),
        ("detris_modules", 4, 4, 16, 1203.8),
    ],
)
def test_no_number_is_lost_or_changed(name, rows, columns, numbers, total):
    table = TABLES[name]
    values = [number(cell) for row in table.rows for cell in row.cells.values()]
    values = [value for value in values if value is not None]
    assert (len(table.rows), len(table.columns), len(values)) == (rows, columns, numbers)
    assert sum(values) == pytest.approx(total, abs=1e-6)


def test_every_table_is_of_a_known_paper_and_every_score_can_be_measured_here():
    papers = published.load().papers
    for table in TABLES.values():
        assert table.paper in papers
        scores = [score for column in table.columns if (score := table.score(column))]
        assert bool(scores) == bool(table.computes) == bool(table.prints)
        for score in scores:
            dataset = DATASETS.build(Choice(name=score.dataset))
            assert score.split in dataset.eval_splits
            assert score.metric in METRICS
        others = [column for column in table.columns if not table.score(column)]
        assert set(others) <= {"params.backbone", "params.prompt", "params.head", "params.total", "avg"}


def test_a_column_names_its_own_metric_where_it_is_not_the_table_s():
    table = TABLES["etris_modules"]
    assert table.score("refcoco/val") == ("refcoco", "val", "miou")
    assert table.score("refcoco/val:pr@0.9") == ("refcoco", "val", "pr@0.9")
    assert TABLES["etris_pet_r101"].score("params.head") is None


def test_averages_of_whole_rows_are_their_means_but_for_one():
    wrong = []
    for table in TABLES.values():
        for row in table.rows:
            scores = [number(cell) for column, cell in row.cells.items() if table.score(column)]
            # A tenth is the paper's own rounding, of numbers that were rounded before.
            if "avg" in row.cells and None not in scores and abs(fmean(scores) - number(row.cells["avg"])) > 0.1:
                wrong.append(row.name)
    assert wrong == ["CGFormer"]


def test_what_two_tables_print_of_one_model_is_the_same_but_for_one():
    printed: dict[tuple, set[float]] = {}
    for table in TABLES.values():
        for row in (row for row in table.rows if row.ours):
            for column, cell in row.cells.items():
                if (score := table.score(column)) and number(cell) is not None:
                    model = (table.paper, row.ours.backbone, row.ours.method, str(row.ours.options))
                    printed.setdefault((*model, score), set()).add(number(cell))
    contradictions = [(key[:3], values) for key, values in printed.items() if len(values) > 1]
    assert contradictions == [(("DETRIS", "dinov2-b", "frozen"), {71.9, 72.0})]


def test_the_scope_table_is_additive():
    first, middle, last, front, back, every = (
        number(row.cells["params.backbone"]) for row in TABLES["etris_bridger_scope"].rows
    )
    assert front == pytest.approx(first + middle)
    assert back == pytest.approx(middle + last)
    assert every == pytest.approx(first + middle + last)


def test_what_could_not_be_read_is_marked():
    uncertain = {
        (row.name, column)
        for table in TABLES.values()
        for row in table.rows
        for column in row.cells
        if row.cells[column].uncertain
    }
    assert uncertain == {
        ("CRIS-R50", "params.head"),
        ("ETRIS-ViT-B", "params.head"),
        ("ETRIS-ViT-B", "params.total"),
        ("two of the three, first†", "refcoco/val"),
    }


@pytest.mark.parametrize(
    "count, printed, expected",
    [
        (120_737_633, "120.74M", "rounding"),
        (2_715_696, "2.71M", "truncation"),
        (1_942_080, "1.94M", "both"),
        (26_210_305, "23.98M", "no"),
        (4_096, "4.10K", "rounding"),
        (0, "0.00K", "both"),
        (1_225_000, "1.23M", "rounding"),  # half up, as one rounds by hand
        (1_225_000, "1.22M", "truncation"),
    ],
)
def test_agreement(count, printed, expected):
    assert agreement(count, printed) == expected


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("2.71M", "2.71M 1.0", "has 6 values for 5 columns"),
        ("method: full}", "method: full, optoins: {}}", "has no key 'optoins'"),
    ],
)
def test_a_slip_in_the_file_is_refused_with_its_line(tmp_path, monkeypatch, old, new, message):
    text = published.FILE.read_text(encoding="utf-8")
    line = text[: text.index(old)].count("\n") + 1
    (tmp_path / "published.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")
    monkeypatch.setattr(published, "FILE", tmp_path / "published.yaml")
    with pytest.raises(UserError, match=message) as caught:
        published.load.__wrapped__()
    assert str(caught.value).startswith(f"{tmp_path / 'published.yaml'}:{line}: ")
