"""Is a packed model, or an export of one, what it says? Read again from the bytes, by nothing that wrote them."""
