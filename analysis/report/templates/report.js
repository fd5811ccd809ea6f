"use strict";
(() => {
  const read = (id) => {
    const node = document.getElementById(id);
    return node ? JSON.parse(node.textContent) : null;
  };

  const root = document.documentElement;

  // --- figures: drawn when they come near the window, because a large study has hundreds ---
  const figures = read("figures") || {};
  const drawn = new Set();
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const themed = (figure) => {
    const ink = css("--ink"), soft = css("--soft"), grid = css("--grid"), line = css("--line"), bg = css("--bg");
    const axis = (own) => ({
      gridcolor: grid, linecolor: line, tickcolor: line, tickfont: { size: 11, color: soft }, fixedrange: true, ...own,
      title: { ...own.title, font: { size: 12, color: soft } },
    });
    const layout = {
      ...figure.layout,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
      hoverlabel: { bgcolor: bg, bordercolor: line, font: { color: ink, size: 12 }, align: "left" },
      xaxis: axis(figure.layout.xaxis || {}), yaxis: axis(figure.layout.yaxis || {}),
    };
    const data = figure.data.map((trace) => trace.type === "heatmap" ? { ...trace, textfont: { size: 11, color: ink } } : trace);
    return [data, layout];
  };

  const draw = (node) => {
    if (!window.Plotly) return;
    drawn.add(node);
    const [data, layout] = themed(figures[node.dataset.figure]);
    // A copy: Plotly writes into what it is given.
    Plotly.react(node, structuredClone(data), structuredClone(layout), { displayModeBar: false, displaylogo: false, responsive: true });
  };

  const plots = [...document.querySelectorAll(".plot")];
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "500px" });
  plots.forEach((node) => watcher.observe(node));

  const redraw = () => drawn.forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  for (const button of document.querySelectorAll("button[data-export]")) {
    button.addEventListener("click", () => {
      const frame = button.closest("figure"), node = frame.querySelector(".plot");
      // A picture leaves the page: it takes its title along, and ink for white paper whatever the page looks like.
      const theme = root.dataset.theme;
      root.dataset.theme = "light";
      const [data, layout] = themed(figures[node.dataset.figure]);
      if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
      const title = frame.querySelector("h3").textContent.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
      const height = layout.height + 34, width = Math.max(node.clientWidth, 560);
      Object.assign(layout, {
        paper_bgcolor: "#ffffff", height, width, margin: { ...layout.margin, t: layout.margin.t + 34 },
        title: { text: title, font: { size: 14 }, x: 0.02, xanchor: "left", y: 1, yanchor: "top", pad: { t: 10 } },
      });
      Plotly.downloadImage(structuredClone({ data, layout }), {
        format: button.dataset.export, filename: node.dataset.figure, width, height,
        scale: button.dataset.export === "png" ? 3 : 1,
      });
    });
  }

  const theme = document.querySelector(".theme");
  if (theme) {
    theme.hidden = false;
    theme.addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      redraw();
    });
  }

  // Paper is white: everything is drawn for it, and drawn back afterwards.
  let shown;
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((node) => { if (!node.closest("figure")) node.open = true; });
    shown = root.dataset.theme;
    root.dataset.theme = "light";
    plots.forEach(draw);
  });
  addEventListener("afterprint", () => {
    if (shown) root.dataset.theme = shown; else delete root.dataset.theme;
    redraw();
  });

  // A link to something inside a fold opens it, also where the address already says so and the reader folded it again.
  const unfold = (hash) => {
    let node = hash.length > 1 && document.getElementById(decodeURIComponent(hash.slice(1)));
    for (; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  };
  addEventListener("hashchange", () => unfold(location.hash));
  addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link) unfold(link.hash);
  });
  unfold(location.hash);

  // --- tables ---
  const compare = (a, b) => {
    // Cells without a figure stay at the bottom in both directions.
    if (a.empty !== b.empty) return a.empty ? 1 : -1;
    return 0;
  };
  const key = (text) => {
    const number = text === "" ? NaN : Number(text);
    return { empty: text === "", number, text, numeric: !Number.isNaN(number) };
  };
  const order = (a, b, sign) => compare(a, b)
    || sign * (a.numeric && b.numeric ? a.number - b.number : a.text.localeCompare(b.text, "en"));

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const first = head.dataset.first || "ascending";
        const now = head.getAttribute("aria-sort");
        const next = now === first ? (first === "ascending" ? "descending" : "ascending") : first;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        // A cell that spans several columns (an outcome without figures) is empty in each of them.
        const at = (row) => {
          let position = 0;
          for (const cell of row.cells) {
            if (position === column) return cell.colSpan > 1 ? "" : cell.dataset.sort ?? cell.textContent.trim();
            position += cell.colSpan;
            if (position > column) return "";
          }
          return "";
        };
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row, index) => ({ row, index, key: key(at(row)) }));
        rows.sort((a, b) => order(a.key, b.key, sign) || a.index - b.index);
        body.append(...rows.map((item) => item.row));
      });
    });
  }

  // --- all trials: kept as data and shown page by page ---
  const trials = read("trial-data");
  const host = document.getElementById("trials");
  if (trials && host) {
    const PAGE = 50;
    const columns = trials.columns.map((column) => ({
      ...column, at: column.index ? (i) => column.values[column.index[i]] : (i) => column.values[i],
    }));
    const search = document.getElementById("trial-search");
    const count = document.getElementById("trial-count");
    const [back, forth] = ["trial-back", "trial-forth"].map((id) => document.getElementById(id));
    const body = host.tBodies[0], heads = [...host.tHead.rows[0].cells];
    let rows = [...Array(trials.n).keys()], page = 0, sorted = null;

    const show = () => {
      const pages = Math.max(1, Math.ceil(rows.length / PAGE));
      page = Math.min(Math.max(0, page), pages - 1);
      body.replaceChildren(...rows.slice(page * PAGE, (page + 1) * PAGE).map((i) => {
        const line = document.createElement("tr");
        columns.forEach((column, c) => {
          const value = column.at(i);
          const cell = document.createElement(c === 0 ? "th" : "td");
          if (c === 0) cell.scope = "row";
          if (column.numeric) cell.className = "n";
          if (column.name === "outcome") cell.className = value;
          cell.textContent = value === null ? "" : column.digits != null ? value.toFixed(column.digits) : String(value);
          if (!column.numeric && value !== null && String(value).length > 30) cell.title = value;
          line.append(cell);
        });
        return line;
      }));
      count.textContent = rows.length
        ? `${page * PAGE + 1}\u2013${Math.min(rows.length, (page + 1) * PAGE)} of ${rows.length} trials` : "No trial matches.";
      back.disabled = page === 0;
      forth.disabled = page >= pages - 1;
    };
    const select = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows = [...Array(trials.n).keys()];
      if (words.length) {
        rows = rows.filter((i) => {
          const line = columns.filter((c) => !c.numeric).map((c) => String(c.at(i) ?? "")).join(" ").toLowerCase();
          return words.every((word) => line.includes(word));
        });
      }
      if (sorted) {
        const column = columns[sorted.column];
        const keys = new Map(rows.map((i) => [i, key(column.at(i) === null ? "" : String(column.at(i)))]));
        rows.sort((a, b) => order(keys.get(a), keys.get(b), sorted.sign) || a - b);
      }
      show();
    };
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      sorted = { column, sign: up ? 1 : -1 };
      page = 0;
      select();
    }));
    search.addEventListener("input", () => { page = 0; select(); });
    back.addEventListener("click", () => { page -= 1; show(); });
    forth.addEventListener("click", () => { page += 1; show(); });
    show();
  }
})();
