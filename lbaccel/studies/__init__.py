"""A study: arms x batch sizes x seeds as ordinary runs, judged together."""
