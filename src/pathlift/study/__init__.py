"""Many networks and any of the functions, as one command that can be killed: one table and one page.

`zoo` reads which networks and which functions, `networks` measures one of them and leaves one file, `table` puts the files
together, `page` draws and writes them.
"""
