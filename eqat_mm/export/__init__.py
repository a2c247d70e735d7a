"""A packed checkpoint in the formats of other engines, without a weight that differs unless somebody asks for it."""
