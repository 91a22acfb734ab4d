"""Constants that were measured, all on two cores of an AMD EPYC with torch 2.13. They change time and
memory; of the results they change the rounding alone.

| constant | value | unit | how to measure again |
| --- | --- | --- | --- |
| `BIN_COST_BYTES` | 600,000 | bytes of slots | time of `expert_step --bases dense` at half and twice the value |
| `MAX_BIN_COUNTS` | 16 | counts of experts | resident memory of `expert_step`: 868 MB without (wide, bf16) |
| `ROW_STEP` | 4 | rows | the same: 716 MB, 1,053 with 1; 5 % slower with 8 |
| `CHUNK_BYTES` | 2,000,000 | bytes of up-projection outputs | memory and time of `expert_step --bases dense` |
| `LARGE_EXPERT`, `PIECE` | 2²⁰, 2¹⁸ | weights | the same with `--bases nf4 --memory_steps 16`, see below |
| `FEW_ROWS` | 160 | routed rows | time of `expert_inference --tokens 8 16 32` at 0 and at the value |
| `ROWS_BY_ROW` | 24 | routed rows | time of `expert_inference --tokens 1 2 4` at 0 and at the value |

The commands are `python -m examples.benchmarks.<name>`. On a shared machine compare the least of several runs that take
turns.
"""

# What the products of LoRA with one more bin of experts cost, as bytes of slots that they read and write, all widths
# together.
BIN_COST_BYTES = 600_000
# In 16 bits oneDNN compiles a kernel for each shape of a product (about 1 ms) and keeps it (about 0.65 MB), so shapes
# are few: experts enter bins in groups of a MAX_BIN_COUNTS-th of them, and rows are rounded up to ROW_STEP.
MAX_BIN_COUNTS = 16
ROW_STEP = 4
# The size of the up-projection's output for the slots that are worked on at a time: large enough to be worth the
# operations, and small, so that little exists beside what is kept for backward.
CHUNK_BYTES = 2_000_000
# On CPU in 16 bits, packed experts of so many weights and more are unpacked PIECE weights at a time. A large tensor
# that is freed leaves a hole in malloc's memory, where one of oneDNN's kernels settles, so that the next tensor does
# not fit: with experts of 2²¹ weights unpacked whole, a process grew to 2.0 GB in 16 steps, by pieces to 0.44 GB.
# Pieces cost a copy, 6 % of a step, so smaller experts are not cut.
LARGE_EXPERT = 1 << 20
PIECE = 1 << 18
# Routed rows up to which `few_rows.py` is the faster way without gradients, and up to which its products with A are row
# by row there: fewer operations than a gather for each expert and a product with all of them.
FEW_ROWS = 160
ROWS_BY_ROW = 24
