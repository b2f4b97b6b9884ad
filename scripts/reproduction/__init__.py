"""What scripts/reproduce.py does: tables, their runs, processes side by side, results."""
