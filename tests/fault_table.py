"""A table of what was made to go wrong, a line each: `make faults`, and after every run of tests.

A test with the marker ``fault(name, ends)`` is such a line: ``name`` of the fault, with parameters
of the test in braces, and how it has to end. A test may record "seconds" that it asserts a bound
of. With --full, what is random or one of many is done as often as the fixture ``times`` says.
"""

import pytest


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="repeat faults often, for minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(name, ends): a line of the table of faults")


@pytest.fixture
def times(request):
    """``times(few, many)``: many with --full."""
    return lambda few, many: many if request.config.getoption("full") else few


def pytest_collection_modifyitems(items):
    for item in items:
        mark = item.get_closest_marker("fault")
        if mark is not None:
            name, ends = mark.args
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            item.user_properties.append(("fault", (name.format(**parameters), ends)))


def pytest_terminal_summary(terminalreporter):
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            properties = dict(getattr(report, "user_properties", ()))
            if "fault" in properties:
                seconds = properties.get("seconds", report.duration)
                rows.append((*properties["fault"], f"{seconds:.1f} s", outcome))
    if not rows:
        return
    rows = [("fault", "has to end in", "took", ""), *sorted(rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("faults")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        terminalreporter.write_line("  ".join(cells).rstrip())
