"""The command line: parses, calls and prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ris_bench.errors import UserError
from ris_bench.layout import METRICS
from ris_bench.records import Result, Trial
from ris_bench.report import breakdowns
from ris_bench.results import Store, read_done

if TYPE_CHECKING:  # it imports torch
    from ris_bench.predict import Predictor

RUN = """\
Runs every trial of an experiment that has no result yet and prints the table. Results are kept by trial and shared by
experiments; the same command goes on where an earlier one stopped, and runs trials that failed again.

exit code:  0 all well   1 a trial failed   2 bad input, nothing was run   130 stopped

On a cluster (--address) every node must see the results, data and weights under the same paths and have this package
installed; its driver and nodes need one token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. Bad flags end in SystemExit(2), as argparse does it."""
    parser = argparse.ArgumentParser(
        prog="ris-bench", description="Parameter-efficient tuning for referring segmentation."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_run(verbs)
    _add_params(verbs)
    _add_import_official(verbs)
    _add_export(verbs)
    _add_compare(verbs)
    _add_data(verbs)
    _add_predict(verbs)
    _add_evaluate(verbs)
    _add_breakdown(verbs)
    _add_score(verbs)
    args = parser.parse_args(argv)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        return args.call(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: what has finished is kept; the same command goes on with the rest", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain when it flushes
        return 130


def _add_results(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--results", type=Path, default="results", metavar="DIR", help="where results are kept (default: %(default)s)"
    )


def _add_data_folder(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--data",
        type=Path,
        default="datasets",
        metavar="DIR",
        help="where refcoco/, ... and images/ lie (default: %(default)s)",
    )


def _add_run(verbs: Any) -> None:
    from_checkout = Path(sys.argv[0]).name == "run_bench.py"
    run = verbs.add_parser(
        "run",
        prog="run_bench.py" if from_checkout else None,
        help="run what an experiment lacks and print its table",
        description=RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(call=lambda args: _run(args, run))
    run.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    run.add_argument(
        "--dry-run", action="store_true", help="print the trials with their parameter counts; needs no data or weights"
    )
    run.add_argument("--json", action="store_true", help="with --dry-run: a JSON list on stdout, and nothing else")
    run.add_argument("--only", default="", metavar="TEXT", help="only trials whose id contains TEXT")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a key of the experiment's defaults, such as train.epochs=2; may be repeated",
    )
    _add_results(run)
    _add_data_folder(run)
    run.add_argument(
        "--weights", type=Path, metavar="DIR", help="where pretrained weights lie (default: caches and the hub)"
    )
    run.add_argument(
        "--executor",
        choices=("ray", "local"),
        default="ray",
        help="through Ray Tune (default), or one after another in this process",
    )
    ray = run.add_argument_group("with Ray")
    ray.add_argument("--max-concurrent", type=_count, metavar="N", help="trials at a time (default: as many as fit)")
    ray.add_argument(
        "--gpus-per-trial",
        type=_share,
        metavar="F",
        help="0 to 1: 0.5 puts two trials on a GPU, 0 all on CPUs (default: 1 where there is a GPU)",
    )
    ray.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a running cluster, or `auto` for the one of this machine (default: start Ray here)",
    )


def _add_params(verbs: Any) -> None:
    params = verbs.add_parser(
        "params",
        help="count tunable parameters, as the papers count them and as they move",
        description="Counts what every pair of backbone and method tunes, beside the figure that a paper prints: of an "
        "experiment, or of all pairs that are possible on the full-size backbones. Needs no data and no weights.",
    )
    params.set_defaults(call=lambda args: _params(args, params))
    params.add_argument("experiment", type=Path, nargs="?", metavar="EXPERIMENT.yaml")
    params.add_argument("--backbone", metavar="NAME", help="only this backbone")
    params.add_argument(
        "--method",
        metavar="NAME",
        help="only this method; its options are those of the published row it stands for, else its defaults",
    )
    params.add_argument("--json", action="store_true", help="a JSON list on stdout, and nothing else")


def _add_import_official(verbs: Any) -> None:
    official = verbs.add_parser(
        "import-official",
        help="turn a released checkpoint of ETRIS or DETRIS into a model of ours",
        description="Reads a best_model.pth of ETRIS (R50, R101, ViT-B/16) or DETRIS (B, L) without executing anything "
        "in it, and writes model.safetensors, with every tensor of the model, and model.json, which says what it is.",
    )
    official.set_defaults(call=_import_official)
    official.add_argument("checkpoint", type=Path, metavar="CKPT")
    official.add_argument(
        "--arch", metavar="NAME", help="such as etris-r101 or detris-b (default: judged by the tensors)"
    )
    official.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")


def _import_official(args: argparse.Namespace) -> int:
    from ris_bench import official  # only now: it imports torch

    print(json.dumps(official.import_official(args.checkpoint, args.out, args.arch), indent=1))
    return 0


def _add_export(verbs: Any) -> None:
    export = verbs.add_parser(
        "export",
        help="write a trained trial to a folder of its own, to pass it on",
        description="Writes the tuned tensors of a trial, or with --merge a whole model that runs without the method, "
        "and model.json, which says how to build and feed it; ris_bench.export.load(FOLDER) reads both.",
    )
    export.set_defaults(call=_export)
    export.add_argument("trial", metavar="TRIAL", help="the beginning of a trial's id, or its folder")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    export.add_argument(
        "--merge", action="store_true", help="fold what was tuned into the pretrained weights, and write them all"
    )
    _add_results(export)
    export.add_argument(
        "--weights", type=Path, metavar="DIR", help="with --merge: where pretrained weights lie (default: as run)"
    )
    export.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="with --merge: a module or .py file that the trial's experiment names as a plug-in; may be repeated",
    )


def _export(args: argparse.Namespace) -> int:
    from ris_bench import plugins  # only now: these import torch
    from ris_bench.export import export

    for name in args.plugin:
        plugins.find(name, Path()).load()
    folder = Store(args.results.absolute()).find(args.trial)
    export(folder, args.out, merge=args.merge, weights=args.weights)
    for file in sorted(args.out.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return 0


PREDICT = """\
Finds what a sentence refers to: in one photo; in every image of a folder; or pair by pair in a CSV file with the
columns image and expression, whose paths start from its folder.

mask         PNG, 0 and 255, of the photo's size
overlay      the photo with the mask tinted and outlined, and the expression below (at most 1600 pixels a side)
probability  a 16-bit greyscale PNG, 65535 is 1; or, named .npy, float32

Of one photo that is written which has a name; STEM.mask.png, STEM.overlay.png and STEM.probability.png in the working
directory if nothing has. Of several photos all is written to --out DIR, a new folder, with an index.csv. A photo is
turned upright as its EXIF orientation says, and its mask with it.
"""


def _add_predict(verbs: Any) -> None:
    predict = verbs.add_parser(
        "predict",
        help="segment what an expression refers to, in photos of your own",
        description=PREDICT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.set_defaults(call=lambda args: _predict(args, predict))
    predict.add_argument("image", type=Path, metavar="IMAGE", help="a photo, a folder of photos, or a .csv of pairs")
    predict.add_argument("expression", nargs="?", metavar="EXPRESSION", help="such as 'the man on the left'")
    predict.add_argument(
        "--checkpoint",
        required=True,
        metavar="TRIAL|DIR",
        help="the beginning of a trial's id, or a folder: of a trial, or written by export or import-official",
    )
    _add_model(predict)
    predict.add_argument("--out", type=Path, metavar="MASK.png|DIR", help="the mask, or with several photos the folder")
    predict.add_argument("--overlay", type=Path, metavar="FILE", help="the overlay of one photo")
    predict.add_argument("--probability", type=Path, metavar="FILE", help="the probability of one photo")


def _add_evaluate(verbs: Any) -> None:
    evaluate = verbs.add_parser(
        "evaluate",
        help="write what a model answers to every expression of a split, to be scored",
        description="Runs a trained model over a split and writes its predictions for `ris-bench score`.",
    )
    evaluate.set_defaults(call=_evaluate)
    evaluate.add_argument(
        "checkpoint",
        metavar="TRIAL|DIR",
        help="the beginning of a trial's id, or a folder: of a trial, or written by export or import-official",
    )
    evaluate.add_argument("--dataset", metavar="NAME", help="such as refcoco (default: what the trial was trained on)")
    evaluate.add_argument("--split", required=True, metavar="NAME", help="such as testA")
    evaluate.add_argument(
        "--data", type=Path, default="datasets", metavar="DIR", help="where refcoco/, ... lie (default: %(default)s)"
    )
    _add_model(evaluate)
    evaluate.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a name that ends in .parquet or .json"
    )
    evaluate.add_argument(
        "--maps",
        action="store_true",
        help="write the network's logits instead of masks: larger, and exact for protocols that resample them",
    )


def _evaluate(args: argparse.Namespace) -> int:
    from ris_bench import predict  # only now: these import torch
    from ris_bench.data.dataset import DATASETS

    model = _load(args, args.checkpoint)
    choice = model.dataset
    if args.dataset is not None and (choice is None or args.dataset != choice.name):
        choice = DATASETS.resolve(args.dataset, {})
    if choice is None:
        raise UserError(f"{args.checkpoint} does not say what it was trained on: name a data set with --dataset")
    dataset, options = DATASETS.build(choice), dict(choice.options)

    def report(done: int, total: int) -> None:
        print(f"\r{done:,} of {total:,} expressions", end="", file=sys.stderr, flush=True)

    number = predict.predict_split(
        model, dataset, args.split, args.data, args.out, options=options, maps=args.maps, report=report
    )
    print(file=sys.stderr)
    print(f"{args.out}: {number:,} predictions; ris-bench score {args.out} --data {args.data} scores them")
    return 0


def _add_breakdown(verbs: Any) -> None:
    breakdown = verbs.add_parser(
        "breakdown",
        help="the scores of trials by category, size, words, ... of the expressions, and how often what goes wrong",
        description="Scores groups of expressions, from the table of every expression that a trial keeps.",
    )
    breakdown.set_defaults(call=_breakdown)
    breakdown.add_argument("trials", nargs="+", metavar="TRIAL", help="the beginning of a trial's id, or its folder")
    breakdown.add_argument(
        "--by",
        action="append",
        choices=list(breakdowns.BY),
        help="what makes a group; may be repeated (default: everything)",
    )
    breakdown.add_argument("--split", action="append", metavar="NAME", help="only this split; may be repeated")
    _add_results(breakdown)
    breakdown.add_argument("--json", action="store_true", help="a JSON list on stdout, and nothing else")


def _breakdown(args: argparse.Namespace) -> int:
    store = Store(args.results.absolute())
    groups = []
    for name in args.trials:
        folder = store.find(name)
        trial, frame = read_done(folder).trial.id, breakdowns.read(folder)
        there = list(dict.fromkeys(frame["split"]))
        if absent := [split for split in args.split or () if split not in there]:
            raise UserError(f"{trial} was not evaluated on {', '.join(absent)}; its splits are {', '.join(there)}")
        frame = frame[frame["split"].isin(args.split or there)]
        groups += [group for by in args.by or breakdowns.BY for group in breakdowns.breakdown(trial, frame, by)]
    print(json.dumps(breakdowns.records(groups), indent=1) if args.json else breakdowns.markdown(groups))
    return 0


def _add_model(verb: argparse.ArgumentParser) -> None:
    """What else a verb is told that loads a trained model."""
    _add_results(verb)
    verb.add_argument("--weights", type=Path, metavar="DIR", help="where pretrained weights lie (default: as run)")
    verb.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="a pixel is in the mask where its probability is greater (default: the checkpoint's own, else 0.35)",
    )
    verb.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="a module or .py file that the trial's experiment names as a plug-in; may be repeated",
    )


def _load(args: argparse.Namespace, checkpoint: str) -> Predictor:
    from ris_bench import plugins, predict  # only now: these import torch

    for name in args.plugin:
        plugins.find(name, Path()).load()
    return predict.load(checkpoint, results=args.results, weights=args.weights, threshold=args.threshold)


def _predict(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    pairs = args.image.suffix.lower() == ".csv"
    several = pairs or args.image.is_dir()
    if pairs != (args.expression is None):
        parser.error("an expression goes with an image or a folder of images; the pairs of a CSV have theirs")
    if args.expression is not None and not args.expression.strip():
        parser.error("the expression is empty")
    if several and (args.out is None or args.overlay or args.probability):
        parser.error("of several photos everything goes to --out DIR")

    from ris_bench import predict  # only now: it imports torch

    if several:
        found = predict.pairs(args.image, args.expression)
        predict.check_folder(args.out)
        for path in predict.predict_all(_load(args, args.checkpoint), found, args.out):
            print(path, flush=True)
        return 0
    names = {"mask": args.out, "overlay": args.overlay, "probability": args.probability}
    if not any(names.values()):
        names = {kind: Path(f"{args.image.stem}.{kind}.png") for kind in names}
    predict.check_names(args.image, **names)
    prediction = _load(args, args.checkpoint)(args.image, args.expression)
    prediction.save(**names)
    share, highest = prediction.mask.mean(), prediction.probability.max()
    print(f"{share:.1%} of the photo; the highest probability is {highest:.3f}")
    for path in filter(None, names.values()):
        print(path)
    return 0


CHECK = """\
Reads the files of a dataset and says of every split what it holds: referents, expressions and images, beside what is
published of them; referents that point to nothing; images that are missing or of another size than their annotation
(only headers are read); polygons and run lengths that are none.

exit code:  0 all well   1 something differs or is at fault   2 bad input, or the dataset is not there
"""


def _add_data(verbs: Any) -> None:
    parser = verbs.add_parser("data", help="look after the data sets").add_subparsers(required=True, metavar="VERB")
    check = parser.add_parser(
        "check",
        help="compare the files of a dataset with what is published of it, and with each other",
        description=CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.set_defaults(call=lambda args: _check_data(args, check))
    check.add_argument(
        "dataset",
        nargs="?",
        metavar="NAME",
        help="as in an experiment: refcoco, or with options: 'own: {file: mine.json}'",
    )
    check.add_argument("--all", action="store_true", help="every dataset that is there and needs no options")
    _add_data_folder(check)
    check.add_argument("--json", action="store_true", help="a JSON list on stdout, and nothing else")

    audit = parser.add_parser(
        "audit",
        help="say what scores on a dataset can hide",
        description="Reports images that one split trains on and another evaluates on, referents on whose ground truth "
        "the released evaluations differ, and expressions that are longer than the model reads.",
    )
    audit.set_defaults(call=_audit_data)
    audit.add_argument("datasets", nargs="*", metavar="NAME", help="as for check (default: all that are there)")
    _add_data_folder(audit)
    audit.add_argument("--json", action="store_true", help="a JSON object on stdout, and nothing else")


def _named(text: str) -> Any:
    from ris_bench.data.dataset import named
    from ris_bench.located import read

    return named(read(text, lambda line: f"dataset {text!r}").plain())


def _audit_data(args: argparse.Namespace) -> int:
    from ris_bench.data import audit  # only now: this imports torch

    chosen = [source for name in args.datasets for source in _named(name).sources]
    found = audit.audit(chosen or audit.present(args.data), args.data)
    print(json.dumps(audit.to_dict(*found), indent=1) if args.json else audit.text(*found))
    return 0


def _check_data(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.all == (args.dataset is not None):
        parser.error("name a dataset, or --all")

    from ris_bench.data import check  # only now: this imports torch

    rows = check.check_all(args.data) if args.all else check.check(_named(args.dataset), args.data)
    print(json.dumps([row.to_dict() for row in rows], indent=1) if args.json else check.text(rows))
    return 0 if all(row.ok for row in rows) else 1


def _add_compare(verbs: Any) -> None:
    compare = verbs.add_parser(
        "compare",
        help="say which differences between the rows of a table are more than chance",
        description="Compares every row of an experiment's table with one of them, from results alone: differences, "
        "95%% intervals and p-values by a paired bootstrap over images, the latter also corrected after Holm for their "
        "number, beside the noise of the seeds.",
    )
    compare.set_defaults(call=_compare)
    compare.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    compare.add_argument("--against", required=True, metavar="METHOD", help="the row to compare with, such as frozen")
    compare.add_argument(
        "--split", nargs="+", default=(), metavar="SPLIT", help="such as val testA (default: those of the table)"
    )
    compare.add_argument(
        "--metric", nargs="+", default=(), choices=METRICS, metavar="METRIC", help="of " + ", ".join(METRICS)
    )
    compare.add_argument("--resamples", type=_count, default=10_000, metavar="N", help="(default: %(default)s)")
    compare.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the bootstrap (default: 0)")
    _add_results(compare)
    compare.add_argument("--json", action="store_true", help="a JSON list on stdout, with fractions instead of percent")


def _compare(args: argparse.Namespace) -> int:
    from ris_bench.experiment import load  # only now: it imports torch
    from ris_bench.report.comparison import compare

    compared = compare(
        load(args.experiment),
        Store(args.results.absolute()),
        args.against,
        splits=args.split,
        metrics=args.metric,
        resamples=args.resamples,
        seed=args.seed,
    )
    print(json.dumps(compared.records(), indent=1) if args.json else compared.markdown().rstrip("\n"))
    return 0


def _natural(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return number


SCORE = """\
Scores one file of predictions, of this harness or of any other model, under several evaluation protocols. The file is
JSON or Parquet: a row for every expression of the splits that it names, with a mask (COCO's run lengths) or a map of
logits or probabilities; ris_bench/predictions.py tells the columns.

A mask is scored as it is, and resampled where a protocol compares elsewhere than in the original image; a map is cut as
the protocol cuts it. ris-bench itself is always among the rows, and the difference to it is a column.
"""


def _add_score(verbs: Any) -> None:
    score = verbs.add_parser(
        "score",
        help="score a file of predictions under several evaluation protocols",
        description=SCORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.set_defaults(call=_score)
    score.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="a JSON or Parquet file")
    score.add_argument(
        "--data", type=Path, default="datasets", metavar="DIR", help="where refcoco/, ... lie (default: %(default)s)"
    )
    score.add_argument(
        "--protocol",
        nargs="+",
        default=[],
        metavar="P",
        help="ris-bench, cris, lavt, cgformer, rela, vlt, polyformer, lisa (default: all)",
    )
    score.add_argument(
        "--validation", action="store_true", help="as the protocols select checkpoints, not as they report results"
    )
    score.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")


def _score(args: argparse.Namespace) -> int:
    from ris_bench import predictions, protocols, scoring  # only now: these import torch

    chosen = [protocols.find(name) for name in args.protocol] or list(protocols.PROTOCOLS.values())
    given = predictions.read(args.predictions)
    stage = "validation" if args.validation else "test"
    scores = scoring.score(given, scoring.load(given, args.data), chosen, stage)
    if args.json:
        print(json.dumps(scoring.record(scores, stage), indent=1))
    else:
        print(scoring.markdown(scores, stage, masks=given.maps is None), end="")
    return 0


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _share(text: str) -> float:
    # A trial computes on one device, so that more would idle.
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return number


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    ray_options = {
        "address": args.address,
        "max_concurrent": args.max_concurrent,
        "gpus_per_trial": args.gpus_per_trial,
    }
    if args.executor == "local" and any(value is not None for value in ray_options.values()):
        parser.error("--max-concurrent, --gpus-per-trial and --address say something to Ray: not with --executor local")
    if args.json and not args.dry_run:
        parser.error("--json goes with --dry-run")

    # Only now: these import torch.
    from ris_bench import sweep
    from ris_bench.experiment import load
    from ris_bench.report import tables
    from ris_bench.trial import Places, run_trial

    experiment = load(args.experiment, args.set)
    store = Store(args.results.absolute())  # the processes of Ray work in other folders
    known: dict[str, Result] = {}
    waiting = sweep.pending(experiment, store, known, args.only)
    trials = [trial for trial in experiment.trials(known) if args.only in trial.id]
    if not trials:
        raise UserError(f"no trial of {args.experiment} has {args.only!r} in its id: --dry-run lists the ids")
    if args.dry_run:
        _print_trials(trials, len(waiting), experiment.choose, as_json=args.json)
        return 0

    places = Places(data=args.data.absolute(), weights=args.weights and args.weights.absolute())
    executor = sweep.in_process() if args.executor == "local" else sweep.through_ray(**ray_options)
    job = sweep.Job(run_trial, store, places, experiment.plugins)
    results = sweep.run(experiment, job, executor, only=args.only)

    table = tables.render(experiment, results)
    tables.write(table, store.root / experiment.name)
    print(table.markdown, end="", flush=True)
    failed = [result for key, result in results.items() if result.status == "failed" and args.only in key]
    for result in failed:
        log = args.results / "trials" / result.trial.id / "log.txt"
        print(f"failed: {result.trial.id}: {result.error}; see {log}", file=sys.stderr)
    return 1 if failed else 0


def _params(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.experiment and (args.backbone or args.method):
        parser.error("an experiment names its own backbones and methods: not with --backbone or --method")

    from ris_bench import params  # only now: it imports torch

    if args.experiment:
        counted, refused = params.of_experiment(args.experiment), {}
    else:
        counted, refused = params.of_registry(args.backbone, args.method)
    print(
        json.dumps([counts.to_dict() for counts in counted], indent=1) if args.json else params.text(counted, refused)
    )
    return 0


def _print_trials(trials: list[Trial], waiting: int, chosen: Sequence[str], *, as_json: bool) -> None:
    from ris_bench.sweep import count_parameters

    counts = count_parameters(trials)
    rows = [
        {
            "id": trial.id,
            "backbone": trial.backbone.name,
            "method": trial.method.name,
            "dataset": trial.dataset.name,
            "seed": trial.seed,
            "params": asdict(counts[trial.id]),
        }
        for trial in trials
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        row |= {name.replace("_", " "): number for name, number in row.pop("params").items()}
    print(tabulate(rows, headers="keys", intfmt=("", "", "", "", "", *[","] * 4)))
    later = f"; more once the best {' and '.join(chosen)} is known" if chosen else ""
    print(f"\n{len(trials)} trials, {waiting} to run{later}")
