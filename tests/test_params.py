"""`ris-bench params`: the papers' columns to the integer, what really moves, and how far the two agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ris_bench import cli, params, published
from ris_bench.backbones.base import BACKBONES
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS

ROOT = Path(__file__).parents[1]
TABLES = published.load().tables


def pair(backbone: str, method: str, options: dict | None = None, **of_backbone) -> params.Pair:
    chosen = METHODS.resolve(method, options or {}), HEADS.resolve("etris", {})
    return params.Pair(BACKBONES.resolve(backbone, of_backbone), *chosen)


@pytest.mark.parametrize(
    "backbone, method, expected",
    [
        # ETRIS counts CLIP whole, with logit_scale, the branch `connect` and all positions at 224 pixels.
        ("clip-r50", "full", (104_106_337, 0, 26_210_305)),
        ("clip-r101", "full", (120_737_633, 0, 23_981_569)),
        ("clip-vit-b16", "full", (149_620_737, 0, 22_408_705)),
        # DETRIS: 86,583,552 or 304,372,736 of DINOv2, and CLIP's text tower without its positions.
        ("dinov2-b", "full", (86_583_552 + 63_428_097 - 39_424, 0, 22_539_777)),
        ("dinov2-l", "full", (304_372_736 + 63_428_097 - 39_424, 0, 22_932_993)),
        ("dinov2-b", "frozen", (0, 0, 22_539_777)),
    ],
)
def test_columns_as_the_papers_count(backbone, method, expected):
    assert tuple(params.count_pair(pair(backbone, method)).paper.values()) == expected


def test_what_moves_is_all_of_it():
    counts = params.count_pair(pair("clip-r101", "full"))
    assert counts.parameters == 120_737_632 + 24_244_225
    assert counts.statistics == 7_680  # of the head
    moving = params.count_pair(pair("clip-r101", "full", norm_stats="batch"))
    assert moving.parameters == counts.parameters
    assert moving.statistics == 7_680 + 106_496  # 107 norms of the image tower, `connect` among them
    assert moving.paper == counts.paper
    at_416 = params.count_pair(pair("clip-vit-b16", "full"))
    assert at_416.parameters == 149_989_377 - 1 + 22_671_361


UNREACHABLE = {("ETRIS-R50", "params.head"), ("ETRIS-ViT-B", "params.head")}
"""The paper prints the head of R101 for every backbone."""


def test_every_published_count_is_reached():
    counted: dict[str, params.Counts] = {}
    for table in (table for table in TABLES.values() if "params.backbone" in table.columns):
        for row in (row for row in table.rows if row.ours):
            ours = row.ours
            if (key := repr(ours)) not in counted:  # a model may stand in several tables
                choices = METHODS.resolve(ours.method, ours.options), HEADS.resolve(ours.head, {})
                counted[key] = params.count_pair(params.Pair(BACKBONES.resolve(ours.backbone, {}), *choices))
            for column, count in counted[key].paper.items():
                if cell := row.cells.get(f"params.{column}"):
                    reached = published.agreement(count, cell.text) != "no"
                    assert reached == ((row.name, f"params.{column}") not in UNREACHABLE), row.name
    assert len(counted) == 24


def test_a_pair_is_compared_with_the_row_that_it_stands_for():
    found = params.count_pair(pair("clip-r101", "bridger", {"stages": [1]}))
    assert (found.figures.row, found.agrees) == ("n/2->n, 1", {"backbone": "truncation"})
    assert params.count_pair(pair("clip-r101", "bridger", {"stages": [0, 2]})).figures is None
    # Released for R50, with another width than the paper's count needs.
    found = params.count_pair(pair("clip-r50", "bridger"))
    assert (found.paper["backbone"], found.figures.row) == (1_942_080, "ETRIS-R50")
    assert found.agrees == {"backbone": "no", "head": "no"}
    assert params.count_pair(pair("clip-r50", "lora")).figures is None


def test_another_head_is_not_compared_with_a_row_that_counts_its_own():
    other = HEADS.resolve("etris", {"layers": 1})
    assert params.count_pair(pair("clip-r101", "bridger")._replace(head=other)).figures.row == "ETRIS-R101"
    assert params.count_pair(pair("clip-r101", "coop")._replace(head=other)).figures is None


def test_a_backbone_that_no_paper_has_is_counted_as_it_is():
    counts = params.count_pair(pair("tiny-dino", "full"))
    assert counts.differences == {}
    assert sum(counts.paper.values()) == counts.parameters


DA, TA, HALF_DA, HALF_TA = 6 * 382_896, 6 * 69_720, 3 * 382_896, 3 * 69_720


@pytest.mark.parametrize(
    "file, expected, table",
    [
        (
            "pet_r101",
            [120_737_633, 0, 2_387_224, 1_204_080, 190_992, 0, 32_768, 1_942_080],
            "etris_pet_r101",
        ),
        (
            "pet_dinov2",
            [149_972_225, 0, 1_982_976, 1_622_144, 1_572_864, 1_387_648, 1_357_848, 2_715_696],
            "detris_pet_dinov2",
        ),
        (
            "etris_bridger_scope",
            [428_736, 297_664, 1_215_168, 726_656, 1_513_088, 1_942_080, 428_736 + 1_215_168 + 256],
            "etris_bridger_scope",
        ),
        ("etris_modules", [0, 1_942_080] * 4, None),
        ("detris_modules", [0, DA, TA, DA + TA, HALF_DA, HALF_TA, HALF_DA + HALF_TA], None),
        ("etris_main", [1_678_104, 1_942_080, 1_387_648], None),
        ("etris_parameters", [1_678_104, 1_942_080, 1_387_648], None),
        ("detris_main", [2_715_696, 3_110_448], None),
        ("detris_mixed", [33_331_360], None),
    ],
)
def test_experiments_of_the_papers_tables(file, expected, table):
    counted = params.of_experiment(ROOT / "experiments" / f"{file}.yaml")
    assert [counts.paper["backbone"] for counts in counted] == expected
    if table:
        rows = [row for row in TABLES[table].rows if row.ours]
        for row, counts in zip(rows, counted, strict=file != "etris_bridger_scope"):
            assert counts.figures.cells["backbone"] == row.cells["params.backbone"]
            assert "no" not in counts.agrees.values()
    if file == "etris_modules":
        # With both; without global alignment; without hierarchical alignment; without both.
        heads = [23_981_569, 16_082_433, 20_829_697, 12_930_561]
        assert [counts.paper["head"] for counts in counted] == [head for head in heads for _ in range(2)]


@pytest.fixture(scope="module")
def everything():
    return params.of_registry(None, None)


def test_all_pairs_are_counted_or_refused_with_a_reason(everything):
    counted, refused = everything
    full_size = {name for name in BACKBONES if not name.startswith("tiny-")}
    found = [(counts.pair.backbone.name, counts.pair.method.name) for counts in counted]
    assert len(set(found)) == len(found)
    assert {backbone for backbone, _ in found} == full_size
    assert len(found) + len(refused) == len(full_size) * len(list(METHODS))
    assert all(refused.values())


def test_the_differences_explain_the_columns_whole(everything):
    for counts in everything[0]:
        assert sum(counts.paper.values()) - sum(counts.differences.values()) == counts.parameters


def test_text_names_sources_marks_and_differences(everything):
    text = params.text(*everything)
    assert "120.74M R, 0.00K RT, 23.98M RT [" in text
    assert "1.68M R, 23.98M ≠ [" in text
    assert "23.98M† ≠" in text
    assert "ETRIS (ICCV 2023), 'Comparison of parameters with existing methods'" in text
    for rules in params.CONVENTIONS.values():
        for rule in rules:
            assert f"  {rule.name} (" in text


def test_what_is_kept_and_shown_is_what_the_command_prints(everything):
    assert (ROOT / "results" / "parameters.txt").read_text(encoding="utf-8") == f"{params.text(*everything)}\n"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = 0
    for counts in everything[0]:
        if counts.pair.backbone.name == "clip-r101" and counts.figures:
            column = "prompt" if counts.paper["prompt"] else "backbone"
            printed, own = counts.figures.cells[column].text, counts.paper[column]
            assert f"| {counts.pair.method.name} | {printed} | {own:,} | {counts.parameters:,} |\n" in readme
            shown += 1
    assert shown == 8


def test_json_is_a_list_of_objects_with_integers(capsys):
    assert cli.main(["params", "--backbone", "clip-r101", "--method", "full", "--json"]) == 0
    [counts] = json.loads(capsys.readouterr().out)
    assert set(counts) == {"backbone", "method", "options", "paper", "published", "agrees", "moves"}
    assert (counts["backbone"], counts["method"]) == ("clip-r101", "full")
    assert counts["paper"] == {"backbone": 120_737_633, "prompt": 0, "head": 23_981_569}
    assert counts["moves"] == {"parameters": 144_981_857, "statistics": 7_680}
    assert counts["published"] == {
        "paper": "ETRIS",
        "table": "Comparison with previous PET methods using ResNet101 as backbone",
        "row": "Full Tuning",
        "backbone": "120.74M",
        "prompt": "0.00K",
        "head": "23.98M",
        "uncertain": [],
    }
    assert counts["agrees"] == {"backbone": "rounding", "prompt": "both", "head": "both"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--backbone", "clip-r101", "--method", "unheard"], "there is no method 'unheard'"),
        (["--backbone", "unheard"], "there is no backbone 'unheard'"),
        (["nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_bad_input_exits_2_with_one_line(capsys, arguments, message):
    assert cli.main(["params", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_an_experiment_names_its_own_pairs():
    with pytest.raises(SystemExit) as caught:
        cli.main(["params", "experiment.yaml", "--method", "lora"])
    assert caught.value.code == 2
