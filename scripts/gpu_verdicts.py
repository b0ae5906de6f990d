"""What the rows of gpu_check.py's stages say: ``pass``, ``fail`` or ``figure``, and a line. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"


def read_tests(folder: Path) -> list[Row]:
    """Return a row for each test that a log of pytest names, with or without workers."""
    log, found = folder / "log", {}
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        worker = re.match(rf"\[gw\d+\] \[ *\d+%\] ({_OUTCOMES}) (tests/.+?) *$", line)
        alone = re.match(rf"(tests/.+?::.+?) ({_OUTCOMES})\b.*$", line)
        if worker:
            found[worker[2]] = worker[1]
        elif alone:
            found[alone[1]] = alone[2]
    return [{"test": test, "outcome": outcome.lower()} for test, outcome in found.items()]


def judge_tests(rows: list[Row]) -> tuple[str, str]:
    """All that ran passed, and some ran."""
    counts = Counter(row["outcome"] for row in rows)
    bad = [row["test"].rpartition("::")[2] for row in rows if row["outcome"] in ("failed", "error")]
    text = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "no test ran"
    return "pass" if counts["passed"] and not bad else "fail", text + (f": {', '.join(bad[:5])}" if bad else "")


def judge_warm(rows: list[Row]) -> tuple[str, str]:
    """Say how many processes came to their end; one that did not leaves its kernels to the stage that needs them."""
    failed = [row["case"] for row in rows if str(row["code"]) != "0"]
    text = f"{len(rows) - len(failed)} of {len(rows)} ended"
    return "figure", text + (f"; not: {', '.join(failed)}" if failed else "")


def judge_indices(rows: list[Row]) -> tuple[str, str]:
    """No row differs by more than the rounding of float32 allows; where sums are exact, none differs at all."""
    parts = [
        f"{row['case']}: {row['differ']} of {row['rows']} rows differ, {row['unexplained']} by more than rounding "
        f"(largest {float(row['largest']):.2g} of what it allows)" + (f"; {row['note']}" if row["note"] else "")
        for row in rows
    ]
    good = bool(rows) and all(int(row["unexplained"]) == 0 and int(row["rows"]) and not row["note"] for row in rows)
    return "pass" if good else "fail", "; ".join(parts) or "nothing was compared"


def judge_layers(rows: list[Row]) -> tuple[str, str]:
    """Say for each group how our fastest full-feature layer compares with the limit that stands first."""
    best: dict[str, Row] = {}
    for row in rows:
        ours = row["case"].startswith(("ConvNN2d blend 1", "ConvNNAttention depthwise"))
        where = f"{row['group']} {row['options']}".replace("backends=torch,triton,auto", "").strip()
        if ours and float(row["ratio"]) < float(best.get(where, {"ratio": "inf"})["ratio"]):
            best[where] = row
    parts = [f"{where}: {row['case']} x{float(row['ratio']):.2f}" for where, row in best.items()]
    return "figure", "; ".join(parts) or f"{len(rows)} cases"


def judge_input(rows: list[Row]) -> tuple[str, str]:
    """Say what share of a step the input takes."""
    times = {row["case"]: float(row["ms_median"]) for row in rows if row["group"] == "input share"}
    if len(times) != 2:
        return "fail", "not measured"
    still, fresh = times.values()
    return "figure", f"the input takes {100 * (1 - still / fresh):.1f} % of a step of {fresh:.2f} ms"


def judge_steps(rows: list[Row]) -> tuple[str, str]:
    """Say the ratios, in time and in memory, of what was timed."""
    parts = []
    for case in dict.fromkeys(row["case"] for row in rows):
        timed = [row for row in rows if row["case"] == case and row.get("step_ms")]
        for row in timed[1:]:
            memory = f", memory x{float(row['peak_ratio']):.2f}" if row.get("peak_ratio") else ""
            if memory and row.get("counted_mib"):
                allowed = 1.5 * float(timed[0]["peak_mib"]) + float(row["counted_mib"])
                memory += f" ({float(row['peak_mib']):.0f} MiB, {allowed:.0f} allowed)"
            parts.append(f"{case} {row['arm']} x{float(row['ratio']):.2f}{memory}")
    notes = [f"{row['case']} {row['arm']}: {row['note']}" for row in rows if row.get("note")]
    return "figure" if parts else "fail", "; ".join(parts + notes) or "nothing was timed"


def judge_compile(rows: list[Row]) -> tuple[str, str]:
    """Say times, and what broke or was compiled anew."""
    verdict, text = judge_steps(rows)
    compiled = [row for row in rows if int(row.get("graphs") or 0)]
    counts = [f"{r['arm']}: {r['graphs']} graphs, {r['graph_breaks']} breaks, {r['recompiles']} anew" for r in compiled]
    return verdict, "; ".join([text, *dict.fromkeys(counts)])


def judge_resume(rows: list[Row]) -> tuple[str, str]:
    """Every tensor and every row of metrics are those of the run that was not stopped."""
    parts = []
    for row in rows:
        if row["note"]:
            parts.append(f"{row['case']}: {row['note']}")
            continue
        far = f"{row['unequal']} unequal, by {float(row['largest_difference']):.3g}"
        same = far if int(row["unequal"]) else "equal"
        when = f"resumed at step {row['stopped_at_step']} of {row['steps']}"
        parts.append(f"{row['case']}, {when}: {row['tensors']} tensors {same}")
    good = bool(rows) and all(r.get("unequal") == "0" and r["equal_metrics"] == "True" for r in rows)
    return "pass" if good else "fail", "; ".join(parts) or "nothing was compared"


def judge_groups(rows: list[Row]) -> tuple[str, str]:
    """All processes have the same weights; one in a group has those that it has alone."""
    good = [float(r["apart"]) == 0 and (int(r["processes"]) > 1 or str(r["as_without"]) == "True") for r in rows]
    parts = [f"{row['case']} by {row['backend']}: weights {float(row['apart']):.3g} apart" for row in rows]
    return "pass" if rows and all(good) else "fail", "; ".join(parts) or "no process answered"


def judge_fast(rows: list[Row]) -> tuple[str, str]:
    """Say the accuracy of the last epoch, and when 94 % were there."""
    if not rows:
        return "fail", "no epoch was trained"
    last = rows[-1]
    there = next((row for row in rows if float(row["test_top1"]) >= 94), None)
    when = f"94 % after {float(there['train_seconds']):.1f} s" if there else "94 % not reached"
    first = float(rows[0]["train_seconds"])
    return "figure", (
        f"top-1 {float(last['test_top1']):.2f} % after {len(rows)} epochs and {float(last['train_seconds']):.1f} s of "
        f"training steps, {first:.1f} s of them the first epoch with its compilation; {when}"
    )


def judge_rows(rows: list[Row]) -> tuple[str, str]:
    """Say what the rows came to, beside what was published."""
    done = [row for row in rows if row["top1_last"]]
    parts = [
        f"{row['row']} {float(row['top1_last']):.2f} % (published {row['top1_last_published']}; {row['status']})"
        for row in done
    ]
    return "figure", "; ".join(parts) or "no row is complete"
