"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO: where their files lie, how they are split, and what the splits hold.

<data>/refcoco/{instances.json, refs(unc).p, refs(google).p}     <data>/refcocog/{instances.json, refs(umd).p, ...}
<data>/refcoco+/{instances.json, refs(unc).p}                    <data>/grefcoco/{instances.json, grefs(unc).json}
"""

from __future__ import annotations

from ris_bench.data.dataset import DATASETS, Counts, Leakage
from ris_bench.data.refer import ReferDataset

PUBLISHED = {
    "refcoco": {
        "train": Counts(42_404, 120_624, 16_994),
        "val": Counts(3_811, 10_834, 1_500),
        "testA": Counts(1_975, 5_657, 750),
        "testB": Counts(1_810, 5_095, 750),
    },
    "refcoco-google": {
        "train": Counts(40_000, None, 19_213),
        "val": Counts(5_000, None, 4_559),
        "test": Counts(5_000, None, 4_527),
    },
    "refcoco+": {
        "train": Counts(42_278, 120_191, 16_992),
        "val": Counts(3_805, 10_758, 1_500),
        "testA": Counts(1_975, 5_726, 750),
        "testB": Counts(1_798, 4_889, 750),
    },
    "refcocog-umd": {
        "train": Counts(42_226, 80_512, 21_899),
        "val": Counts(2_573, 4_896, 1_300),
        "test": Counts(5_023, 9_602, 2_600),
    },
    "refcocog-google": {
        "train": Counts(44_822, 85_474, 24_698),
        "val": Counts(5_000, 9_536, 4_650),
    },
}
"""Referents: CRIS utils/dataset.py:13-39, and with the images tensorflow/datasets ref_coco README, which calls objects
expressions. Expressions: OneRef merge_split_file_for_mixup.py:57-121. None: found in no source, and of
gRefCOCO's splits nothing was."""


@DATASETS("refcoco")
def refcoco(*, leakage: Leakage = "forbid") -> ReferDataset:
    """Yu et al., "Modeling Context in Referring Expressions", ECCV 2016. testA is people, testB everything else."""
    return _dataset("refcoco", "refcoco", "unc", 17, ("val", "testA", "testB"), leakage=leakage)


@DATASETS("refcoco-google")
def refcoco_google(*, leakage: Leakage = "forbid") -> ReferDataset:
    """RefCOCO as split by object, so images of val and test are in train too."""
    return _dataset("refcoco-google", "refcoco", "google", 17, ("val", "test"), leakage=leakage)


@DATASETS("refcoco+")
def refcoco_plus(*, leakage: Leakage = "forbid") -> ReferDataset:
    """RefCOCO's sister without words of place."""
    return _dataset("refcoco+", "refcoco+", "unc", 17, ("val", "testA", "testB"), leakage=leakage)


@DATASETS("refcocog-umd")
def refcocog_umd(*, leakage: Leakage = "forbid") -> ReferDataset:
    """Mao et al., "Generation and Comprehension of Unambiguous Object Descriptions", CVPR 2016; splits by image."""
    return _dataset("refcocog-umd", "refcocog", "umd", 22, ("val", "test"), leakage=leakage)


@DATASETS("refcocog-google")
def refcocog_google(*, leakage: Leakage = "forbid") -> ReferDataset:
    """RefCOCOg as first split: by object, so images of val are in train too; its test split was never released."""
    return _dataset("refcocog-google", "refcocog", "google", 22, ("val",), leakage=leakage)


@DATASETS("grefcoco")
def grefcoco(*, leakage: Leakage = "forbid") -> ReferDataset:
    """Liu et al., "GRES: Generalized Referring Expression Segmentation", CVPR 2023: an expression means one object,
    several or none. Its code reads 20 tokens (ReLA gres_model/config.py, MAX_TOKENS)."""
    return _dataset("grefcoco", "grefcoco", "unc", 20, ("val", "testA", "testB"), stem="grefs", leakage=leakage)


def _dataset(
    name: str,
    folder: str,
    partition: str,
    word_len: int,
    eval_splits: tuple[str, ...],
    stem: str = "refs",
    *,
    leakage: Leakage,
) -> ReferDataset:
    published = PUBLISHED.get(name, {})
    return ReferDataset(name, folder, partition, word_len, eval_splits, published=published, stem=stem, leakage=leakage)
