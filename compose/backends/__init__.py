"""See compose/plan.py and docs."""
