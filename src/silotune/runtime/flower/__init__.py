"""Everything that knows Flower: its engine, its apps, its records, its strategies."""
