"""The trainers: Block-AP, one block at a time, and E2E-QP, the step sizes of the whole model."""
