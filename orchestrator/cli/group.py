"""The group of all commands, before any is in it."""

import click


class Commands(click.Group):
    """Commands in the order in which they were added, with a suggestion for a mistyped one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they were added."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called, or name the nearest one."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            import difflib

            near = difflib.get_close_matches(args[0], self.commands, n=1)
            meant = f"; did you mean '{near[0]}'?" if near else "."
            raise click.UsageError(f"There is no command '{args[0]}'{meant} See fixstudy --help.", ctx) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fixstudy", message="%(prog)s %(version)s")
def cli() -> None:
    """Tells which fixing approach to use on a failing model, and what it will break.

    A study runs fixers on subjects, with seeds and hyper-parameters, and writes Parquet that any SQL tool reads.
    Start with: fixstudy run examples/quickstart.yaml
    """
