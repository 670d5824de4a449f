#!/usr/bin/env bash
# What is measured on one GPU, in at most 15 minutes: its tests, then the cells of benchmarks.methods.
# Run it from the root of a checkout whose environment is active.
set -euo pipefail
cd "$(dirname "$0")/.."
timeout 240 python -m pytest -q tests/gpu
# Eager, compiled, and with CUDA graphs, the most informative first; no cell starts after 8 minutes.
timeout 600 python -m benchmarks.methods --minutes 8 --names uw pcgrad nash "nash every step"
