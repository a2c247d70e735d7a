"""Small readers of what is exported, by numpy or by the packages of the engines; nothing of the exporters is in them."""
