"""Forecasts the step times of the paper's Table 3 and prints a Markdown table; needs neither libtpu nor an accelerator.

python -m scripts.paper_forecast
"""

from rattn import platform
from rattn.planning import paper, roofline


def main() -> None:
    """Prints the fit of both readings of v5p-1024, then the twelve cells."""
    platform.configure()
    found = paper.readings()
    for topology, calibration in found.values():
        errors = paper.relative_errors(paper.FITTED, topology, calibration, roofline.RELEASED_KERNEL)
        possible = "" if calibration.efficiency <= 1 else ": impossible"
        print(
            f"v5p-1024 read as {topology.chips} chips: efficiency {calibration.efficiency:.3f}{possible}, fixed "
            f"{calibration.fixed_seconds:.3f} s a step; the eight fitted cells {abs(errors).mean():.1%} off on "
            f"average, {abs(errors).max():.1%} at most."
        )
    topology, calibration = found[paper.READINGS[0]]
    kernels = (roofline.RELEASED_KERNEL, roofline.OUR_KERNEL[topology.chip.name])
    print()
    print("| cell | | paper, s | released kernel, s | error | our kernel, s | linear branch, s: released / ours |")
    print("|---|---|---|---|---|---|---|")
    for cell in paper.TABLE_3:
        released, ours = (paper.forecast(cell, topology, calibration, kernel) for kernel in kernels)
        unseen = cell in paper.UNSEEN
        linear = [paper.arithmetic(cell, topology, kernel)[1] for kernel in kernels]
        print(
            f"| {cell} | {'unseen' if unseen else 'fitted'} | {cell.seconds:.2f} | {released:.2f} | "
            f"{released / cell.seconds - 1:+.1%} | {f'{ours:.2f}' if unseen else ''} | "
            f"{f'{linear[0]:.3f} / {linear[1]:.3f}' if unseen else ''} |"
        )


if __name__ == "__main__":
    main()
