"""What is printed and drawn: tables, pages, pictures, explanations, progress."""
