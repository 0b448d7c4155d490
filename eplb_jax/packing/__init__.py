"""Balanced packing: n weighted items into m packs of exactly n / m items."""
