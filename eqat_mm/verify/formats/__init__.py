"""Small readers of what is exported, by numpy or by packages of the engines, without a line of the exporters."""
