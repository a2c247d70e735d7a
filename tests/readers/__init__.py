"""Other people's engines over our folders, each in a process of its own where this package is out of reach."""
