"""A comparison as text for a terminal, a pull request, a browser, a CI server or a program."""
