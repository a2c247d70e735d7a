"""Python's face: what the commands do, as functions that take and return models. `eqat_mm` names them."""
