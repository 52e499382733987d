for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => head.firstChild.onclick = () => {
    const up = head.getAttribute("aria-sort") !== "ascending", key = row => row.cells[i].dataset.key ?? "";
    const numbers = [...body.rows].every(row => key(row) === "" || !isNaN(key(row)));
    const compare = numbers ? (a, b) => (key(a) === "") - (key(b) === "") || key(a) - key(b)
      : (a, b) => key(a).localeCompare(key(b));
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * compare(a, b)));
  });
}
