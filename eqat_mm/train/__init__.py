"""The trainers: Block-AP, one block at a time; E2E-QP, step sizes of the whole model; LLM-QAT, all its weights."""
