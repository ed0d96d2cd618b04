"""The tables of docs/performance.md that are of a GPU, from published rows: ``python -m examples.gpu.report``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from examples.benchmarks.report import fill_page
from examples.command_line import CommandParser, run

__all__ = ["main", "sections"]

PUBLISHED = Path(__file__).with_name("published") / "h200.jsonl"
PAGE = Path("docs/performance.md")


def sections(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Markdown by name: gpu-hardware, gpu-kernels, gpu-steps."""
    device, rows = rows[0], rows[1:]
    hardware = (
        f"Measured on: one {device['device']}, torch {device['torch']}, Triton {device['triton']}; a large copy moved "
        f"{device['bytes_per_second'] / 1e12:.1f} TB/s, a large bfloat16 product ran at "
        f"{device['bf16_flops'] / 1e12:.0f} TFLOP/s."
    )
    return {
        "gpu-hardware": hardware,
        "gpu-kernels": _kernels([row for row in rows if row["part"] == "kernels"]),
        "gpu-steps": _steps([row for row in rows if row["part"] == "steps"]),
    }


def _kernels(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| B, C, D | storage, precision | product | pass | ratio | with the queries' gradient | largest error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        sums = f"{row['with_sums_ms']:.3g} ms" if "with_sums_ms" in row else "-"
        lines.append(
            f"| {row['batch']}, {row['capacity']}, {row['dim']} | {row['storage']}, “{row['precision']}” "
            f"| {row['product_ms']:.3g} ms | {row['kernel_ms']:.3g} ms | **{row['ratio']:.2f}** | {sums} "
            f"| {row['largest_error']:.0e} |"
        )
    return "\n".join(lines)


def _steps(rows: list[dict[str, Any]]) -> str:
    shape = rows[0]["shape"]
    lines = [
        f"| B={shape['batch']}, C={shape['capacity']}, D={shape['dim']} | time | memory |",
        "| --- | ---: | ---: |",
    ]
    for row in rows:
        if "skipped" not in row:
            # What a graph takes was taken when it was captured.
            memory = "-" if row["method"].endswith("-graph") else f"{row['peak_bytes'] / 2**20:.0f} MiB"
            lines.append(f"| {row['label']} | {row['seconds_median'] * 1e3:.3g} ms | {memory} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Fills the page."""
    parser = CommandParser("gpu.report", description=__doc__)
    parser.add_argument("--rows", type=Path, default=PUBLISHED, metavar="FILE", help="JSON lines")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the page to fill")
    options = parser.parse_args(arguments)

    def command(options: Any) -> None:
        rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
        fill_page(options.page, sections(rows))

    return run(command, options)


if __name__ == "__main__":
    sys.exit(main())
