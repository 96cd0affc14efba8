"""The text format, and the sum of several processes."""

from __future__ import annotations

from modelserve.monitor.metrics.exposition import Family, Figures, histogram, merged, sample, text

FAMILIES = (
    Family("hits_total", "counter", "Hits."),
    Family("seconds", "histogram", "Times."),
    Family("ready", "gauge", "Readiness.", min),
    Family("silent_total", "counter", "Never counted."),
)
ONE, TWO = 'model="m",version="1"', 'model="m",version="2"'


def test_samples_are_written_under_their_families() -> None:
    """Families have their lines of help and type, in order; buckets are cumulative, and labels are escaped."""
    labels = {"model": 'a"b\\c\nd'}
    samples = {sample("ready", {}): 1.0, sample("hits_total", labels): 3.0}
    samples |= histogram("seconds", {}, (0.5, 1.0), [2, 0, 1], 4.25)
    assert text(samples, FAMILIES) == (
        "# HELP hits_total Hits.\n"
        "# TYPE hits_total counter\n"
        'hits_total{model="a\\"b\\\\c\\nd"} 3\n'
        "# HELP seconds Times.\n"
        "# TYPE seconds histogram\n"
        'seconds_bucket{le="0.5"} 2\n'
        'seconds_bucket{le="1"} 2\n'
        'seconds_bucket{le="+Inf"} 3\n'
        "seconds_sum 4.25\n"
        "seconds_count 3\n"
        "# HELP ready Readiness.\n"
        "# TYPE ready gauge\n"
        "ready 1\n"
    )


def test_samples_of_no_family_are_left_out() -> None:
    """What only a later release counts costs an earlier one, which shares the folder with it, nothing."""
    samples = {"hits_total": 1.0, 'shadows_total{model="m"}': 2.0, "odd": 3.0}
    assert text(samples, FAMILIES) == "# HELP hits_total Hits.\n# TYPE hits_total counter\nhits_total 1\n"


def test_processes_are_merged() -> None:
    """Counts add up, of ended processes too; how things stand is merged by its own rule, of living ones alone."""
    alive = [
        Figures({ONE: {"hits_total{" + ONE + "}": 2.0}, "": {"seconds_count": 1.0}}, {"ready": 1.0}),
        Figures({ONE: {"hits_total{" + ONE + "}": 3.0}}, {"ready": 0.0}),
    ]
    ended = [
        Figures(
            {
                ONE: {"hits_total{" + ONE + "}": 10.0},
                TWO: {"hits_total{" + TWO + "}": 99.0},
                "": {"seconds_count": 5.0},
            },
            {"ready": 0.5},
        )
    ]
    assert merged(alive, ended, FAMILIES) == {"hits_total{" + ONE + "}": 15.0, "seconds_count": 6.0, "ready": 0.0}


def test_counts_of_an_unloaded_version_count_while_another_process_has_it() -> None:
    """A sum does not go back when one process frees the version and another still drains; then the labels go."""
    counts = {ONE: {"hits_total{" + ONE + "}": 1000.0}}
    has, had = Figures(counts, {}), Figures({}, {}, counts)
    whole = {"hits_total{" + ONE + "}": 2000.0}
    assert merged([has, has], [], FAMILIES) == whole
    assert merged([had, has], [], FAMILIES) == whole
    assert merged([has], [had], FAMILIES) == whole
    assert merged([had, had], [had], FAMILIES) == {}
