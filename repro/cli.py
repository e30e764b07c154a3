"""The command line. Every command imports what it needs when it runs: ``--help`` loads nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from repro.errors import ReproError

app = typer.Typer(
    name="repro",
    help="Does an efficiency paper's claim hold here, and if not, why?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
zoo_app = typer.Typer(no_args_is_help=True, help="The embedded models: list, verify, train.")
app.add_typer(zoo_app, name="zoo")

INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended

ManifestPath = Annotated[
    str, typer.Argument(metavar="MANIFEST", help="A YAML file such as manifests/xattention.yaml.")
]
Profile = Annotated[str, typer.Option("--profile", "-p", help="Profile of the manifest.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Runs = Annotated[str, typer.Option(help="Folder of the run store.")]
Artifacts = Annotated[
    str | None,
    typer.Option(
        envvar="REPRO_ARTIFACTS",
        help="Folder or URL (s3://bucket/folder) where machines share calibrations.",
    ),
]
Results = Annotated[str, typer.Option(help="Folder of the written results.")]
Slugs = Annotated[list[str] | None, typer.Argument(metavar="[SLUG]...", help="All where left out.")]


def main() -> NoReturn:
    """Run the command line; every ReproError is printed as its text, with its exit code."""
    try:
        app(standalone_mode=True)
    except ReproError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(0)


@app.command()
def methods(
    slug: Annotated[str | None, typer.Argument(help="Show one method in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or show one with its options and claims."""
    from repro import listings

    if slug is None:
        rows = listings.methods()
        _emit(rows, as_json, lambda: listings.print_methods(rows))
    else:
        detail = listings.method(slug)
        _emit(detail, as_json, lambda: listings.print_method(detail))


@app.command()
def plan(
    manifest: ManifestPath,
    profile: Profile = "embedded",
    device: Device = "auto",
    runs: Runs = "runs",
    as_json: AsJson = False,
) -> None:
    """Check a manifest and show its cells, a time estimate and what is missing."""
    from repro import listings
    from repro import manifest as manifests
    from repro.plan import make_plan

    made = make_plan(manifests.load(manifest, profile=profile), profile, device=device)
    listing = listings.plan(made, runs)
    _emit(listing, as_json, lambda: listings.print_plan(listing))


@app.command()
def run(
    manifest: ManifestPath,
    profile: Profile = "embedded",
    executor: Annotated[
        str,
        typer.Option(
            help="auto, inline or ray. auto takes ray (if installed) where there is more than one "
            "group of cells or an --address, and inline for one group on one machine."
        ),
    ] = "auto",
    device: Device = "auto",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time to spend, such as 10m or 2gpu-h: every cell asks as many items as fit, and "
            "the run says which difference these can show. A cell ends early when no outcome of "
            "its other items could change a verdict."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Run the cells whose label holds this text or pattern.")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Compute again what is done already.")] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going/--fail-fast", help="After a cell that failed.")
    ] = True,
    implied: Annotated[
        bool,
        typer.Option(
            "--implied/--no-implied",
            help="Take the longer cells of what ran out of memory as out of memory too.",
        ),
    ] = True,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster.")] = None,
    artifacts: Artifacts = None,
    runs: Runs = "runs",
    results: Results = "results",
    report: Annotated[bool, typer.Option(help="Write the results and show the table.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a profile of a manifest: what is done already is reused, what fails does not stop it."""
    from repro import runner
    from repro.report.files import check_writable

    if report:
        check_writable(Path(results))
    _stop_on_sigterm()
    try:
        outcome = runner.run(
            manifest,
            profile=profile,
            runs=runs,
            executor=executor,
            device=device,
            only=only,
            budget=budget,
            fresh=fresh,
            keep_going=keep_going,
            implied=implied,
            address=address,
            artifacts=artifacts,
            quiet=quiet or as_json,
        )
    except KeyboardInterrupt:
        _say_how_to_go_on()
        sys.exit(INTERRUPTED)
    if report:
        _report(outcome.name, profile, runs, results, quiet=quiet or as_json)
    summary = {
        "name": outcome.name,
        "profile": outcome.profile,
        "counts": outcome.counts,
        "records": list(outcome.records),
    }
    _emit(summary, as_json, lambda: None if quiet else _print_counts(outcome.counts))
    sys.exit(outcome.exit_code)


@app.command()
def submit(
    manifest: Annotated[
        str | None, typer.Argument(metavar="[MANIFEST]", help="Not with --attach.")
    ] = None,
    address: Annotated[
        str, typer.Option(help="Ray's job server; it runs what it is sent, so keep it private.")
    ] = "http://127.0.0.1:8265",
    profile: Profile = "paper",
    device: Device = "auto",
    attach: Annotated[str | None, typer.Option(help="Follow this job again.")] = None,
    follow: Annotated[bool, typer.Option(help="Stay until the job ends.")] = True,
    requirements: Annotated[
        str | None, typer.Option(help="Packages that the cluster installs first.")
    ] = None,
    runs: Runs = "runs",
    results: Results = "results",
) -> None:
    """Run a manifest on a Ray cluster: ship the checkout, follow the job, bring the records back."""
    from repro import submission
    from repro.errors import BadInput, Fault

    if (manifest is None) == (attach is None):
        got = "neither" if manifest is None else "both"
        raise BadInput(Fault("submit", "MANIFEST or --attach", "given, and not both", got))
    say = lambda line: print(line, file=sys.stderr, flush=True)
    job = attach or submission.submit(
        str(manifest),
        address=address,
        profile=profile,
        device=device,
        runs=runs,
        requirements=requirements,
        say=say,
    )
    how = f"repro submit --attach {job} --address {address}"
    say(f"job {job}")
    if not follow:
        _emit(how, False, lambda: print(f"follow it with: {how}"))
        sys.exit(0)
    _stop_on_sigterm()
    try:
        succeeded = submission.follow(job, address=address, runs=runs, say=say)
    except KeyboardInterrupt:
        say(f"detached; the job goes on. Follow it with: {how}")
        sys.exit(INTERRUPTED)
    from repro import report as reports

    written = reports.write([], runs=Path(runs), results=Path(results))
    lines = [f"written: {path}" for path in written if path.suffix == ".md"]
    _emit(lines, False, lambda: print("\n".join(lines)))
    sys.exit(0 if succeeded else 1)


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="<name>/<profile>.")] = None,
    runs: Runs = "runs",
    as_json: AsJson = False,
) -> None:
    """Say how far a run is, also while it runs; without RUN, list all runs."""
    from repro import listings
    from repro import status as states
    from repro.store import RunStore

    store = RunStore(runs)
    wanted = store.runs() if run is None else [states.find(store, run)]
    found = [states.examine(store, *pair) for pair in wanted]
    if run is None:
        _emit(found, as_json, lambda: listings.print_runs(found))
    else:
        _emit(found[0], as_json, lambda: listings.print_run(found[0]))


@app.command()
def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="<name>/<profile>.")],
    cell: Annotated[str, typer.Argument(metavar="CELL", help="Part of its label, or its key.")],
    runs: Runs = "runs",
    as_json: AsJson = False,
) -> None:
    """Show the outcome and the log of the cells of a run that match."""
    from repro import listings
    from repro import status as states
    from repro.store import RunStore

    store = RunStore(runs)
    found = states.logs(store, *states.find(store, run), cell)
    _emit(found, as_json, lambda: listings.print_logs(found))


@app.command()
def report(
    slugs: Slugs = None, runs: Runs = "runs", results: Results = "results", as_json: AsJson = False
) -> None:
    """Write results/ from the run store and the committed records."""
    from repro import report as reports

    written = reports.write(list(slugs or []), runs=Path(runs), results=Path(results))
    paths = [str(path) for path in written]
    _emit(paths, as_json, lambda: print("\n".join(paths)))


@app.command()
def verify(
    slugs: Slugs = None, runs: Runs = "runs", results: Results = "results", as_json: AsJson = False
) -> None:
    """Judge every claim; exit code 1 if a proxy claim does not hold."""
    from repro import listings
    from repro import report as reports

    rows = reports.verify(list(slugs or []), runs=Path(runs), results=Path(results))
    _emit(rows, as_json, lambda: listings.print_verdicts(rows))
    sys.exit(1 if any(row["broken"] for row in rows) else 0)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None,
    device: Device = "auto",
    quick: Annotated[bool, typer.Option(help="Fewer and smaller cases.")] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the rows below <results>/kernels/records.")
    ] = False,
    results: Results = "results",
    as_json: AsJson = False,
) -> None:
    """Measure kernels against their dense baseline, or the suite's own cost."""
    from rich.console import Console

    from repro import bench as benches
    from repro.plan import resolve_device

    console = Console(stderr=as_json)
    if device == "auto":  # a device that is asked for and absent gets rows that say so
        device = resolve_device(device)
    kept = Path(results) / "kernels" if record else None
    measured = benches.run(
        list(names or []), device=device, quick=quick, console=console, record=kept
    )
    if kept is not None:
        line = f"rows kept below {kept}; `repro report` shows them"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    _emit(measured, as_json, lambda: None)


@app.command()
def doctor(as_json: AsJson = False, runs: Runs = "runs") -> None:
    """Say what this machine can run, and what to install for the rest."""
    from repro import doctor as checks

    found = checks.examine(Path(runs))
    _emit(found, as_json, lambda: checks.print_findings(found))


@zoo_app.command("list")
def zoo_list(as_json: AsJson = False) -> None:
    """List the embedded models."""
    from repro import listings

    rows = listings.zoo()
    _emit(rows, as_json, lambda: listings.print_zoo(rows))


@zoo_app.command("verify")
def zoo_verify(names: Slugs = None, as_json: AsJson = False) -> None:
    """Compare the embedded models with their checksums; exit code 1 if one differs."""
    from repro import zoo

    known = zoo.names()
    rows = []
    for name in names or known:
        if name not in known:
            from repro.errors import BadInput, Fault, near_matches

            remedy = near_matches(name, known)
            raise BadInput(Fault("zoo verify", "a model", "a known name", name, remedy))
        try:
            zoo.verify(name)
            rows.append({"name": name, "status": "ok", "message": ""})
        except ReproError as error:
            rows.append({"name": name, "status": "differs", "message": str(error)})
    lines = [f"{row['name']}: {row['message'] or row['status']}" for row in rows]
    _emit(rows, as_json, lambda: print("\n".join(lines)))
    sys.exit(0 if all(row["status"] == "ok" for row in rows) else 1)


@zoo_app.command("train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="Name of an embedded model.")],
    quick: Annotated[bool, typer.Option(help="About 10 minutes, to a lower bar.")] = False,
    output: Annotated[
        str | None, typer.Option(help="Folder of the checkpoints and of the result.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = True,
    device: Device = "auto",
) -> None:
    """Train an embedded model by its recipe: staged, seeded, resumable."""
    from repro import zoo

    _stop_on_sigterm()
    try:
        zoo.train(
            name,
            quick=quick,
            output=None if output is None else Path(output),
            resume=resume,
            device=device,
        )
    except KeyboardInterrupt:
        _say_how_to_go_on()
        sys.exit(INTERRUPTED)


def _emit(value: Any, as_json: bool, show: Any) -> None:
    with _reader_may_leave():
        if as_json:
            from repro.keys import jsonable

            print(json.dumps(jsonable(value), indent=2, ensure_ascii=False))
        else:
            show()


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Take it as no failure that nobody reads on, as in ``repro methods | head``."""
    try:
        yield
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # Rich makes an exit with code 1 of a broken pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(name: str, profile: str, runs: str, results: str, *, quiet: bool) -> None:
    from repro import registry
    from repro import report as reports

    # A manifest without a paper concerns every method that it ran: all reports are made anew.
    slugs = [name] if name in registry.slugs() else []
    written = reports.write(slugs, runs=Path(runs), results=Path(results))
    if not quiet:
        with _reader_may_leave():
            reports.console_table(name, profile, runs=Path(runs), results=Path(results))
            for path in written:
                if path.suffix == ".md":
                    print(f"written: {path}")


def _print_counts(counts: dict[str, int]) -> None:
    reused = counts.get("cached", 0)
    ran = ", ".join(f"{number} {status}" for status, number in counts.items() if status != "cached")
    print(f"cells: {reused} reused" + (f", {ran}" if ran else ""))


def _say_how_to_go_on() -> None:
    import shlex

    arguments = [word for word in sys.argv[1:] if word != "--fresh"]
    command = shlex.join(["repro", *arguments])
    print(f"stopped; what is finished is kept. Go on with: {command}", file=sys.stderr)


def _stop_on_sigterm() -> None:
    """Let a termination end a run as Ctrl-C does: stored and resumable."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
