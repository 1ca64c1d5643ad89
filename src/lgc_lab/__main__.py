"""`python -m lgc_lab` and the `lgc` command."""

try:
    from lgc_lab.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(f"lgc's command line needs the package {error.name}: pip install 'lgc[app]'") from None

if __name__ == "__main__":
    main()
