"""Metrics of plans, replays of traces, and loads to measure on."""
