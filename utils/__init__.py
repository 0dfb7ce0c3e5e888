"""A teacher-student image classifier in a series of notebooks; this package is what they import."""
