"""RAM, GPU memory, disk, bytes written and hours of a run, from the configuration and the settings alone.

`shape` builds the model without storage and counts; `block_ap`, `e2e_qp`, `llm_qat` and `finish` hold the formulas of
the phases, `costs` the constants in them, `machine` what a card or this CPU can do. docs/planning.md says what was
checked against what.
"""
