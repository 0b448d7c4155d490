"""How good plans are: metrics, replays of traces, and the loads to measure on."""
