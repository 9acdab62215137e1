"""Results as pictures, tables and one page. Needs numpy, matplotlib where something is drawn, and no torch.

comparison.compare(folders, out)      evaluations beside each other: paired gains, the frontier
comparison.run_names(folders)         how folders are called in tables and pictures
figures.picture(path, panels)         panels side by side, as PNG and SVG
figures.lines(title, x, y, series)    a panel of lines; bars, heat, gained, solved, lengths: others
sections                              a function a section of the page: files of results to a Section
page.report(folders, out)             the page of everything that is in folders
"""
