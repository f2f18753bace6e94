"""Questions with numbers for answers: one file each, results in results/*.csv."""
