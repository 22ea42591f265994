"""One comparison as text for a terminal, a pull request, a browser, a CI server, a program."""
