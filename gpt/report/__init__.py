"""What is made of a finished or running run: a page in the terminal, an HTML file, a comparison."""
