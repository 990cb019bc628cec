"""German cues."""

from __future__ import annotations

import re
from collections.abc import Mapping

from plugins.judges.lexicons.shape import Lexicon, table, words_of

WORDS: Mapping[str, str] = {
    "reply": (
        r"(?:antwort|erklarung|text|version|entwurf|vorschlag|formulierung|ton|stil|format|liste|"
        r"ergebnis|zusammenfassung|ubersetzung|rechnung|summe|zahl|satz|absatz|mail|nachricht|"
        r"code|losung|fassung|variante)"
    ),
    "it": r"(?:es|das|dies|diese|dieser|dieses|die|der|alles|beides)",
    "be": r"(?:ist|sind|war|waren|wird|klingt|liest sich|sieht|wirkt|scheint|passt|bleibt)",
    "very": (
        r"(?:(?:so|sehr|echt|wirklich|richtig|ganz|ziemlich|einfach|absolut|total|mega|voll|"
        r"schon|jetzt|ja|viel|noch|doch|genau|auch|gleich|wieder|aber|uberhaupt|etwas|"
        r"ein bisschen|leider|immer noch|viel zu|zu)\s+)*"
    ),
    "good": (
        r"(?:perfekt|super|toll|klasse|prima|spitze|genial|grossartig|ausgezeichnet|hervorragend|"
        r"wunderbar|wunderschoen|fantastisch|top|gut|schoen|hilfreich|richtig|korrekt|klar|"
        r"verstandlich|bestens|stark|sauber|fein|cool|ideal|einwandfrei|tadellos|treffend|"
        r"stimmig|verstandlicher|besser|klarer|schoener)"
    ),
    "bad": (
        r"(?:falsch|verkehrt|fehlerhaft|schlecht|schrecklich|furchtbar|mies|unbrauchbar|nutzlos|"
        r"sinnlos|unsinn|quatsch|blodsinn|mull|unvollstandig|abgeschnitten|leer|verwirrend|"
        r"unklar|unverstandlich|unleserlich|kalt|steif|holprig|holzern|langweilig|unfreundlich|"
        r"unpassend|ungenau|veraltet|kaputt|daneben|vertauscht|verdreht|verrutscht|verwechselt|"
        r"doppelt|umstandlich|kompliziert|ubertrieben|geschwollen|nichtssagend|erfunden|gelogen)"
    ),
    "redo": (
        r"(?:korrigier|berichtig|andere?|ander|uberarbeit|verbesser|kurz|vereinfach|uberpruf|"
        r"pruf|wiederhol|mach|schreib|formulier|rechne|versuch|fass|fang|nimm|lass|streich|losch|"
        r"entfern|erganz|setz|stell|gib|zeig|erklar|ersetz|benutz|verwend|bleib|halt|dreh)"
    ),
}

_IDIOMS = (
    (
        -1,
        (
            r"danke fur (?:nichts|gar nichts)",
            r"\bnicht (?:so )?(?:ganz|wirklich|richtig|gut|das|so|korrekt|hilfreich|was ich)\b",
            r"\b(?:kein|keine|keinen) (?:gute|guter|hilfe)\b",
            r"konnte besser sein",
            r"\bvon wegen\b",
            r"\b(?:so|das) (?:geht|stimmt|passt|hilft|klappt|funktioniert|reicht|"
            r"bringt)(?: \w+){0,2} (?:nicht|nichts|nie|kaum)\b",
            r"\bna (?:toll|super|klasse|prima|danke|bravo|herrlich)\b",
        ),
    ),
    (
        1,
        (
            r"\bnicht (?:schlecht|verkehrt|ubel)\b",
            r"\bnichts (?:auszusetzen|zu meckern|zu beanstanden)\b",
            r"\bkann (?:man )?nicht (?:meckern|klagen)\b",
            r"\b(?:keine|ohne) (?:fehler|beanstandung|probleme|einwande)(?: mehr)?\b",
            r"\b(?:du hast|da hast du|sie haben|hattest|hast ja|haben) (?:ja |doch |vollig |"
            r"vollkommen )*recht\b",
            r"\bmein (?:fehler|irrtum)\b|\bich (?:hatte|habe?) mich (?:\w+ )?(?:geirrt|vertan|"
            r"verlesen|verrechnet)\b|\bhatte ich (?:\w+ )?(?:falsch|verwechselt)\b",
            r"\b(?:geht|klappt|lauft|funktioniert|tut|passt) (?:jetzt|nun|wieder|endlich|alles|"
            r"einwandfrei|wunderbar|super|perfekt|tadellos|bestens|prima)(?: \w+)?",
            r"\bbesser geht(?:'s| es)? (?:nicht|kaum)\b",
        ),
    ),
    (
        0,
        (
            r"\bkein (?:problem|thema|stress|ding)\b|\bkeine (?:eile|ursache|sorge|umstande)\b",
            r"\bnein,? danke\b|\bdanke,? nein\b",
            r"\b(?:vielen )?dank (?:im voraus|schon ?mal)\b|\bdanke (?:schon ?mal|vorab)\b",
            r"\bguten (?:morgen|tag|abend)\b|\bgute (?:nacht|frage|idee)\b|\bschoenen (?:tag|"
            r"abend)\b",
            r"\bmacht nichts\b|\bschon gut\b|\bnicht schlimm\b|\bnicht wahr\b|\bweiss nicht\b",
            r"\bnoch (?:eine|einen|eins|einer|mehr|zwei|drei)(?: bitte)?$",
            r"\bwas (?:ist|stimmt) (?:\w+ )?(?:falsch|nicht) (?:an|mit) (?:meine?m?|diese?m?)\b.*",
        ),
    ),
)  # fmt: skip

GERMAN = Lexicon(
    signs=words_of(
        """
        der das und ist nicht ich du mir mich ein eine einen zu mit auf für den dem im auch aber
        noch bitte danke wie ja nein wir sie sich von bei oder wenn dann doch schon nur da
        kannst hast habe hab kein keine nach aus um über zum zur wer wo warum als dass sind
        """
    ),
    idioms=tuple((value, table(rows, WORDS)) for value, rows in _IDIOMS),
    praise=table(
        (
            r"\b(?:endlich|na endlich)\b(?!.{0,80}\b(?:mal|nicht|kein)\b)|\b(?:traumhaft|goldig|"
            r"herrlich|der wahnsinn|ein traum|wie von selbst|reibungslos|problemlos|einwandfrei|"
            r"tip ?top|10 von 10|bombe|knaller)\b|\b(?:chef|chefin|kundin|kunde|frau|mann|"
            r"tochter|sohn|lehrerin|lehrer|team|nachbar\w*|oma|mama|papa) (?:ist |war |fand |"
            r"findet |hat )(?:\w+ ){0,4}(?:begeistert|happy|zufrieden|toll|super|klasse|gefreut|"
            r"gelacht|genehmigt|freigegeben|unterschrieben|abgenickt|zugestimmt)\b",
            r"\b(?:hat|haben) (?:\w+ )?geschmeckt\b|\b(?:lecker|kostlich|ein gedicht)\b|"
            r"\balle wollten\b|\b(?:prufung|test|klausur|abgabe|tuv|"
            r"bewerbung) (?:\w+ )?(?:bestanden|geschafft|durch)\b|\b(?:ist|sind) (?:jetzt |"
            r"endlich |alle )?weg$",
            r"^(?:krass|wahnsinn|irre|hammer|geil|mega|boah|respekt|der hammer|oha|wow)\b",
            r"\b(?:druckt|startet|bootet|heizt|ladt|speichert|verbindet|piept|ruckelt|spinnt|"
            r"meckert) (?:er |sie |es |alles )?(?:jetzt|wieder|endlich|nicht mehr|einwandfrei)\b",
            r"^(?:(?:ah+|oh|ach|ja|jo|jep|jawohl|ok|okay|na|haha|hey|wow|und|also|so|sehr|echt|"
            r"wirklich|richtig|ganz|einfach|absolut|total|mega|jetzt|das ist|"
            r"viel)\s+)*{good}(?:$|[ !]+(?:gemacht|gelost|erklart|geschrieben|formuliert|arbeit|"
            r"antwort|idee|danke|so|dank|vielen|erklarung|hinbekommen|getroffen|zusammengefasst|"
            r"text)\b)",
            r"\b{it} {be} {very}{good}\b",
            r"\bgenau (?:so|das|richtig|was ich|mein|danach|wie ich|getroffen)\b|^(?:genau|"
            r"stimmt|exakt|richtig|passt(?: so)?|top|laeuft|lauft|klappt|geht|sitzt|nice|jackpot|"
            r"volltreffer)$",
            r"\b(?:passt|klappt|funktioniert|lauft|stimmt|sitzt|geht) (?:so|perfekt|super|gut|"
            r"alles|prima|wunderbar|jetzt|wieder|wie|bei mir|einwandfrei|auf anhieb|sofort|"
            r"endlich)\b",
            r"\bhat (?:super |prima |sofort |wunderbar |gleich |perfekt |tatsachlich |bestens |"
            r"wirklich )*(?:geklappt|funktioniert|geholfen|gezogen|gepasst|gewirkt|gereicht)\b",
            r"\b(?:hilft|half) (?:mir |uns )?(?:sehr|weiter|enorm|total|echt|ungemein)\b",
            r"\b(?:nehm|nehme|nehmen|ubernehm|ubernehme|ubernehmen|behalt|behalte|verwende|"
            r"benutze|schicke?|gekauft)\b(?: (?:ich|wir))?(?: (?:das|es|die|den|ihn|sie|"
            r"alles))?(?: \w+)? ?(?:so|genau so|gleich|direkt|raus|ab)?$",
            r"\b(?:ist|sind|wurde|hab(?:e|s)?|haben|schon) (?:\w+ ){0,3}(?:abgeschickt|"
            r"rausgeschickt|ubernommen|ausgedruckt|eingereicht|veroffentlicht|gemergt|gemerged|"
            r"deployt|verschickt|gespeichert|abgehakt|erledigt|gelost|behoben)\b",
            r"\b(?:ticket|fall|thema|sache|akte) (?:kann|ist|kannst du|"
            r"konnen wir) (?:\w+ )?(?:zu|geschlossen|erledigt|abgehakt|gelost|schliessen|"
            r"zumachen)\b|\bhaken (?:dran|dahinter)\b",
            r"\b(?:problem|fehler|ruckler|warnung|meldung|gerausch)\w* (?:ist|"
            r"sind) (?:\w+ )?(?:weg|verschwunden|behoben|gelost)\b",
            r"\b(?:gefallt mir|liebe (?:ich|es)|mag ich|bin (?:sehr |echt )?(?:begeistert|"
            r"zufrieden|happy|beeindruckt|baff|froh)|freut mich|ist glucklich|sind glucklich|"
            r"ist begeistert)\b",
            r"\b(?:du bist|sie sind|bist) (?:ein |der |die |mein |echt )*(?:schatz|held|retter|"
            r"retterin|beste|bester|genie|goldwert|gold wert|engel|spitze)\b|\bhast (?:mir |"
            r"was )?(?:den tag |gut )?(?:gerettet|bei mir)\b|\bgold wert\b|\brettet? (?:mir|"
            r"meinen)\b",
            r"\bdaran lag(?:'s| es)?\b|\bdas war(?:'s| es)\b|\bwar (?:genau )?(?:das|"
            r"der fehler)$|\blag (?:\w+ )?(?:daran|am)\b",
            r"\bendlich (?:verstanden|kapiert|ruhe|geschafft|lauft|klappt|geht)\b|\bjetzt (?:hab|"
            r"habe|versteh|kapier)\w*(?: ich)?(?:'s| es)?(?: (?:verstanden|kapiert|begriffen))?$|"
            r"\bwieder was gelernt\b|\bauf anhieb\b|\bwie (?:geschmiert|am schnurchen|neu|"
            r"gewunscht|bestellt)\b",
            r"\bdoppelt so (?:hoch|gut|schnell|viel)\b|\bso (?:gut|schnell|schoen) wie (?:nie|"
            r"noch nie|lange nicht)\b|\b(?:kein|keine) (?:\w+ )?(?:fehler|warnung|meldung|"
            r"absturz|problem)\w* mehr\b",
            r"\bhut ab\b|\brespekt$|\bchapeau\b|\bweltklasse\b|\bich schulde dir\b|"
            r"\bich geb(?:e)? (?:dir )?einen aus\b",
            r"\balles (?:klar|gut|bestens|prima|da|richtig|grun|in ordnung|super)$",
        ),
        WORDS,
    ),
    thanks=table(
        (
            r"\b(?:danke|dankeschoen|merci|thx|vielen dank|herzlichen dank|besten dank|"
            r"lieben dank|tausend dank|dank dir|dank ihnen|danke dir)\b",
        )
    ),
    complaint=table(
        (
            r"\bhast du (?:\w+ ){0,4}(?:uberhaupt|eigentlich|denn) (?:\w+ )?(?:gelesen|zugehort|"
            r"geprufe?t|getestet|hingeschaut|verstanden|angeschaut)\b",
            r"^(?:(?:nein|ne|nee|hm+|leider|sorry|also|ja|aber|und|oh|ach|na|immer noch|"
            r"schon wieder|wieder|noch immer|alles|total|vollig|komplett|ziemlich|etwas|"
            r"ein bisschen|viel|so)\s+)*(?:zu \w+|{bad})(?: (?:so|wieder|gerechnet|geschrieben|"
            r"verstanden|ubersetzt|formuliert))?$",
            r"\b(?:{it}|{reply}|\w+) {be} (?:\w+ )?{very}{bad}\b",
            r"\b(?:viel|etwas|ein bisschen|leider|deutlich|immer noch|mir) zu (?:lang|kurz|"
            r"formell|formlich|kompliziert|steif|technisch|viel|wenig|gross|klein|hoch|niedrig|"
            r"spat|fruh|teuer|allgemein|werblich|salopp)\w*\b",
            r"^(?:nein|ne|nee|no|no+|hae|was|wie bitte|bitte was|ernsthaft|im ernst|echt jetzt|"
            r"och no|puh|meh|mist|arg|argh)$",
            r"^(?:nein|ne|nee)\b(?! danke)",
            r"\b(?:stimmt|passt|klappt|funktioniert|geht|hilft|gefallt|reicht|lauft|kompiliert|"
            r"startet|rechnet|offnet|verstehe?|sehe?|finde?|kapiere?|"
            r"tut)\b(?: \w+){0,4} (?:nicht|nichts|nix|nirgends|kaum|gar nicht|noch nicht|"
            r"auch nicht|immer noch nicht|nie|kein|keine|keinen)\b",
            r"\b(?:nicht|nichts|nix) (?:\w+ )?(?:gefragt|gemeint|gewollt|gebeten|verlangt|"
            r"bestellt|verstanden|gelesen|beachtet|geholfen|geklappt|funktioniert|passiert|"
            r"geandert|angekommen|erledigt|gemacht|drin|dabei|da|zu sehen|weglassen|passieren|"
            r"stehen|hilfreich|richtig)\b",
            r"\b(?:fehlt|fehlen|vergessen|ubersehen|ignoriert|ausgelassen|weggelassen|"
            r"verwechselt|missverstanden|verrechnet|vertippt|verschrieben|erfunden|abgeschnitten|"
            r"uberschrieben)\b",
            r"\b(?:hatte|habe|hab) (?:ich )?(?:\w+ ){0,6}(?:gebeten|gesagt|gefragt|gemeint|"
            r"verlangt)\b",
            r"\b(?:ich (?:wollte|meinte)|gemeint war|gefragt war|gesucht war)\b",
            r"\b(?:immer noch|noch immer|schon wieder|weiterhin|nach wie vor) (?!danke)\w+",
            r"\b(?:gleiche[rsn]?|selbe[rsn]?|derselbe|dieselbe) (?:fehler|problem|ergebnis|bild|"
            r"meldung|mist|text|unsinn)\b",
            r"\b(?:steht|ist|sind|kommt|gibt|hat) (?:\w+ ){0,2}(?:kein|keine|keinen|keinerlei|"
            r"gar kein|nur|bloss) ",
            r"\b(?:warum|wieso|weshalb|wozu) (?:hast|machst|ist|sind|steht|so|nicht|schreibst|"
            r"nimmst|denn|immer|dann)\b",
            r"\b(?:was soll|wie soll|wem soll)\b|\bwas heisst das\b|\bbist du (?:dir )?sicher\b|"
            r"\bsicher\?*$|\b(?:ergibt|macht) (?:\w+ )?keinen sinn\b|"
            r"\bverstehe? (?:ich )?nur bahnhof\b",
            r"\b(?:fuhrt|bringt|taugt|nutzt) (?:\w+ )*(?:zu )?nichts\b|\blassen wir das\b|"
            r"\blass (?:mal )?(?:gut sein|stecken|es|das)\b|\bvergiss es\b|"
            r"\bmach(?:e)? ich (?:es |das )?(?:lieber )?selbst\b|\bdann (?:eben|halt) (?:nicht|"
            r"anders|selbst)\b|\bhat keinen zweck\b|\bgeb(?:e)? (?:ich )?auf\b",
            r"\bgenau das (?:sollte|wollte|durfte) (?:\w+ )*nicht\b",
            r"\b(?:liest|klingt|hort) sich (?:\w+ )?(?:wie|nach|an wie) (?:eine?|aus|vom|von) ",
            r"\bdu hast (?:\w+ ){0,4}(?:geandert|geloscht|verandert|genommen|gesetzt|benutzt|"
            r"gemacht|geschrieben|geschickt|falsch)\b(?! (?:danke|super))",
        ),
        WORDS,
    ),
    directive=table(
        (
            r"\bin (?:einem|zwei|drei|einer) (?:satz|satzen|wort|worten|zeile)$",
            r"\b(?:kannst|konntest|konnen|konnten|wurdest|wurden|magst|kriegst) (?:du|sie|"
            r"wir) (?:\w+ ){0,5}?(?:nochmal|noch mal|noch einmal|erneut|anders|neu|ohne|kurzer|"
            r"einfacher|korrigieren|andern|uberarbeiten|nachsehen|nachschauen|prufen|uberprufen|"
            r"umschreiben|anpassen|berichtigen|vereinfachen|kurzen|ersetzen|stattdessen|"
            r"freundlicher|formeller|lockerer)\b",
            r"\b(?:bitte|mach|mache|schreib|schreibe|formulier|formuliere|versuch|versuche|"
            r"rechne|fang|fange|probier|probiere|gib|sag|erklar|"
            r"erklare) (?:\w+ ){0,5}?(?:nochmal|nochmals|noch mal|noch einmal|erneut|anders|neu|"
            r"von vorn|von vorne|korrigieren|andern|ohne|kurzer|langer|einfacher|freundlicher|"
            r"formeller|lockerer|richtig|ordentlich|stattdessen)\b",
            r"^(?:(?:und|aber|also|jetzt|dann|so|ok|okay|bitte|nein|bitte mal|diesmal|"
            r"nur)\s+)*(?:nochmal|nochmals|noch mal|noch einmal|erneut|von vorn|von vorne|neu|"
            r"anders|neuer versuch|zweiter versuch|kurzer|langer|einfacher|freundlicher|"
            r"konkreter|formeller|lockerer|zuruck)\b",
            r"\b(?:nochmal|noch mal|noch einmal|neu|von vorn|von vorne|anders)(?: bitte)?$",
            r"\bbitte (?:neu|nochmal|ohne|nur|kein|keine|mit|in|auf|wieder|lieber|etwas|"
            r"ein bisschen|kurzer|langer|einfacher|alles|nicht|das|die|den) ?\w*",
            r"\b(?:soll|sollte|sollten|sollst|muss|musste|mussten|musst) (?:\w+ ){1,6}?(?:sein|"
            r"heissen|stehen|werden|lauten|rein|raus|weg|bleiben|haben|bekommen|kommen)\b",
            r"\b(?:nachstes mal|beim nachsten mal|in zukunft|kunftig|ab jetzt|ab sofort|diesmal)\b",
            r"\b(?:statt|anstatt|anstelle|lieber|besser ware|schoener ware|stattdessen)\b",
            r"\bmach (?:das|es|alles|bitte)? ?(?:\w+ )?(?:ruckgangig|weg|rein|raus|wieder|kurzer|"
            r"langer)\b|\b(?:setz|stell|dreh|nimm|rolle?) (?:\w+ ){0,4}(?:zuruck|raus|weg)\b",
            r"^(?:korrigier|berichtig|uberarbeit|verbesser|kurz|vereinfach|wiederhol|streich|"
            r"losch|entfern|erganz|ersetz|schau|guck|sieh|pruf)e? (?:\w+ ){0,4}(?:das|es|bitte|"
            r"nochmal|mal|den|die|dein\w*)\b",
            r"\bohne (?:\w+ )?(?:bitte|liste|aufzahlung|emojis|fettdruck|uberschriften|"
            r"anglizismen)\b",
            r"\bich (?:hatte|hab|habe|brauch|brauche|will|mochte) (?:\w+ )*(?:lieber|gern|"
            r"gerne) (?:\w+ )*",
        ),
        WORDS,
    ),
    mockery=table(
        (
            r"\bum mir zu sagen\b|\bschoen dass (?:du|sie|wir)\b|"
            r"\b(?:herzlichen )?gluckwunsch[,!.]* (?:jetzt|nun|du|sie)\b|\bschoen,? dass du\b",
            r"[.!] bravo\b",
            r"\b(?:wer braucht (?:schon|denn|bitte)|da (?:freut|freuen) sich|"
            r"wird sich (?:\w+ ){0,3}freuen|so kann man(?:'s| es)? auch|problem gelost|"
            r"dann kann ich ja (?:gleich|auch)|kannst ja gleich|wie schoen dass|was wurd ich)\b",
            r"\b(?:na|ja|oh|ach|wow|echt|wie) (?:toll|super|klasse|prima|bravo|herrlich|danke|"
            r"genial)\b[ ,.!]+(?!danke|dank|das hilft|funktioniert|klappt)\w+",
            r"(?:^|[.!] )(?:klar|super|toll|klasse|prima|genial|perfekt|herrlich|grossartig|"
            r"wunderbar|spitze|schoen|sehr schoen|danke)[,.!]* (?:dann|da|jetzt|nun|den rest|"
            r"fehlt nur|wenn|mein|meine|unser|unsere|der kunde|die kund)\b.{0,80}\b(?:dann|wird|"
            r"werden|werd|freuen|freut|konnen|kann|konnte|brauch|brauche|muss|musst|mussen|ja|"
            r"wohl|nur|zahlt|bestimmt|sicher|endlich)\b",
            r"\b(?:da|darauf) (?:war|ware|bin|hatte) ich (?:ja )?(?:nie|niemals|nicht|"
            r"selbst nie) (?:selbst )?(?:drauf |darauf )?(?:gekommen)?|"
            r"\bhatte ich nie (?:gedacht|vermutet|erraten)\b|\bwer hatte das (?:gedacht|"
            r"geahnt)\b|\bwas fur eine (?:uberraschung|erkenntnis|leistung)\b",
            r"\b(?:sherlock|einstein|captain obvious|nobelpreis|blitzmerker|meisterleistung|"
            r"glanzleistung|hellseher|raketenwissenschaft|wow was fur)\b",
            r"\bdanke fur (?:die |den |das )?(?:expertise|info captain|nichts|tiefen einblick|"
            r"hinweis sherlock)",
            r"\b(?:mein|meine) (?:oma|opa|toaster|hund|katze|auto|kaffeemaschine|"
            r"hamster)\b.{0,80}\b(?:auch|besser|schon)\b",
            r"\bhauptsache\b.*|\b(?:fast|beinahe) (?:schon )?(?:kunst|genial|poesie)\b|"
            r"\bsehr witzig\b|\bselten so gelacht\b|\bganz grosses kino\b|\bgrosses kino\b|"
            r"\bapplaus\b|\bda (?:brauch|brauche|muss|kann|kauf|kaufe) ich (?:ja )?(?:wohl|dann|"
            r"glatt)\b|\bwie aufmerksam\b|\bwas wurde ich (?:nur |bloss )?ohne\b|"
            r"\bgut dass wir (?:das|daruber)\b|\bwozu auch\b|\bals ob\b|\bwie praktisch\b|"
            r"\bschoen dass\b.{0,80}\b(?:aber|nur|gefragt)\b",
        )
    ),
    earnest=table((r"\bim ernst\b", r"\b(?:spass|scherz)(?: beiseite)?\b", r"\behrlich\b")),
    undecided=table(
        (
            r"\b(?:besprechen|beraten|mal sehen|mal schauen|mal abwarten|grosstenteils|"
            r"uberwiegend|mal so mal so|schwanke|unentschieden|unschlussig|hangt davon ab|"
            r"kommt drauf an|geteilter meinung|einige|manche|die meisten|das meiste|"
            r"fast alle[sn]?|weiss (?:noch )?nicht (?:ob|recht|so)|muss (?:ich |mal |noch |"
            r"erst )*\w+ ?(?:sehen|schauen|fragen|prufen|klaren|testen|uberlegen|abwarten))\b",
            r"\bfrag(?:e)? (?:ich |da |mal |noch )*(?:nach|meine?n?|den|die|das)\b",
            r"^\b(?:die|der|das|den|beim?|am|im|erste[rsnm]?|zweite[rsnm]?|dritte[rsnm]?|"
            r"eine[rs]?|andere[rsn]?|rest|teil \d|(?:mon|diens|donners|frei|sams|sonn)tag|"
            r"mittwoch)\b (?:\w+ ){0,3}?(?:ist |sind |hat )?(?:geht|gehen|lauft|laufen|klappt|"
            r"klappen|funktioniert|funktionieren|passt|passen|stimmt|stimmen|gut|super|perfekt|"
            r"fertig|erledigt|da|drin|schneller|besser|leiser|"
            r"richtig)\b[^?]{0,60}[,;.] ?(?:aber |nur |dafur )?\b(?:die|der|das|den|beim?|am|im|"
            r"erste[rsnm]?|zweite[rsnm]?|dritte[rsnm]?|eine[rs]?|andere[rsn]?|rest|teil \d|"
            r"(?:mon|diens|donners|frei|sams|sonn)tag|mittwoch)\b [^?]{0,60}\b(?:nicht|kein\w*|"
            r"nie|noch|fehlt|fehlen|immer noch|leer|falsch|langsam|nichts|weiterhin|gleich|"
            r"unverandert|fehler|kaputt|zweifel|unsicher|keine ahnung)\b",
            r"\b\d+ (?:von|der) (?:den )?\d+\b|\bnoch nicht (?:ganz|alles|uberall|perfekt)\b",
            r"\b(?:die|eine|erste|zweite|andere) halfte\b|\bder rest (?:fehlt|hangt|ist noch|"
            r"geht|kommt|bleibt|lauft|nicht)\b|\bnur (?:zwei|drei|eine|einer|eins|ein teil)\b",
            r"\bbei gelegenheit\b|\bdemnachst\b|\bdie tage\b|\bin ruhe\b|\b(?:schau|hor|les|"
            r"guck)e? (?:\w+ ){0,4}rein\b",
            r"\b(?:geht|gehen|lauft|laufen|klappt|klappen|funktioniert|besser|schneller|weg|"
            r"behoben)\b.{0,80}\b(?:aber|nur|dafur|allerdings|bei|beim)\b.{0,80}\b(?:nicht|noch|"
            r"kein\w*|fehlt|fehlen|weiterhin|zweifel)\b",
            r"\b(?:mal|noch) (?:sehen|schauen|gucken|abwarten|uberlegen|daruber schlafen)\b|"
            r"\bschau(?:e|n|'n)?(?: (?:ich|wir|es|mir|das|ma|mal|uns|sie))* (?:spater|"
            r"heute abend|morgen|nachher|in ruhe|am wochenende|noch|an)\b",
            r"\b(?:melde mich|geb(?:e)? (?:dir |ihnen )?bescheid|sag(?:e)? (?:dir |"
            r"ihnen )?bescheid|bespreche?n? (?:wir |das |ich )|muss (?:ich |"
            r"das )?(?:\w+ )?(?:noch )?(?:testen|prufen|lesen|fragen|uberlegen|klaren|schauen|"
            r"abklaren|besprechen|sacken lassen))\b",
            r"\b(?:lese?|teste?|prufe?|probiere?|frage?|klare?) (?:ich |es |das |mir |"
            r"mal )*(?:heute|morgen|spater|nachher|noch|mal|gleich|am|in ruhe|erst)\b",
            r"\b(?:weiss|keine ahnung) (?:ich )?(?:noch )?(?:nicht|ob)\b|\b(?:kann|"
            r"lasst sich) (?:ich )?(?:noch )?nicht (?:sagen|beurteilen)\b|"
            r"\bnoch nicht (?:getestet|probiert|gelesen|dazu gekommen|sicher|entschieden|"
            r"ausprobiert)\b|\bnoch keine (?:zeit|meinung)\b|"
            r"\bbin (?:mir )?(?:noch )?(?:nicht sicher|unsicher|unschlussig|unentschlossen|"
            r"hin- und hergerissen)\b",
            r"\b(?:halb (?:so|gut|fertig|richtig|erledigt)|teils|teilweise|zum teil|durchwachsen|"
            r"gemischt|fifty fifty|so lala|jein|naja)\b|\b(?:die eine|erste|zweite) halfte\b|"
            r"\bzweifel\b|\bkann (?:auch )?an (?:mir|meine)\b|\bliegt vielleicht an\b|"
            r"\bvielleicht (?:liegt|ist|sind|war) (?:es|das|auch|nur|mein)\b|\betwas besser\b",
        )
    ),
    doubt=table(
        (
            r"^(?:ahm|ahem|naja|na ja)\b|\bmusste (?:das|es|da|der|die) nicht\b",
            r"\b(?:kann es sein|konnte es sein|kann das sein|ware das nicht|ist das nicht|"
            r"ist nicht|heisst (?:das|es) nicht|musste (?:das|es|da) nicht|sollte (?:das|"
            r"es) nicht|war das nicht|oder (?:nicht|irre|tausch|etwa)|meines wissens|soweit ich|"
            r"soviel ich|wenn ich mich nicht|wenn mich nicht|ich (?:glaub|glaube|dachte|denke|"
            r"meine|finde|kenne|lese|sehe|sehe da|hatte)|meine ich|glaub ich|dachte ich|"
            r"eigentlich|genau genommen|streng genommen|kleinigkeit|nur eine|kleiner fehler|"
            r"kleine korrektur|fast|beinahe|knapp|ware|waren|musste|sollte|sollten|gehort|"
            r"gehoren|schreibt sich|schreibt man|heisst|statt|sondern|nur|bloss|leider|schade)\b",
        )
    ),
    negation=table(
        (
            r"\b(?:nicht|nichts|kein|keine|keinen|keiner|nie|niemals|ohne|zu (?:lang|kurz|viel|"
            r"wenig|gross|klein|hoch|spat|fruh))\b",
        )
    ),
    new_task=table(
        (
            r"^(?:(?:ok|okay|so|und|gut|also|alles klar|super|prima|na gut|"
            r"danke)\s+)*(?:weiter (?:mit|geht|im)|nachste (?:frage|aufgabe)|nachstes(?: thema)?|"
            r"als nachstes|andere frage|anderes thema|themenwechsel|was anderes|etwas anderes|"
            r"ganz was anderes|ubrigens|apropos|neue frage|neue aufgabe|neues thema|"
            r"noch eine frage|noch was|noch etwas|eine andere|zuruck zu|jetzt zu|jetzt noch|"
            r"dann noch|ausserdem|nebenbei|wo ich dich|kommen wir|wechseln wir|moment|warte|"
            r"wart mal|sekunde)\b",
        )
    ),
    soft_transition=table(
        (
            r"^(?:(?:ok|okay|so|und|gut|also|na|aber|ja|mh+|hm+|dann|hallo|hi|hey|moin|servus|"
            r"guten morgen|du|sag mal|ach)\s+)*(?:was|wie|wer|wann|wo|welche[rsnm]?|wohin|woher|"
            r"womit|wieviel|warum|wieso|kannst du (?:mir|auch|noch|mal)|konntest du (?:mir|auch|"
            r"noch)|kennst|weisst du|gibt es|gibt's|hast du (?:auch|noch)|ich (?:brauche|suche|"
            r"mochte|muss|will|wurde)|hilf mir|zeig mir|such|suche|trag|stell mir|erinner|"
            r"schreib mir|ubersetz|zahlt|gilt|geht (?:das|es) auch|muss ich|soll ich|kann (?:ich|"
            r"man)|darf (?:ich|man)|brauch(?:e|t)? (?:ich|man)|lohnt|reicht)\b",
        )
    ),
    reference=table(
        (
            r"\b(?:das|es|dein\w*|deren|du hast|so|nochmal|noch mal|noch einmal|stattdessen|"
            r"diesmal|anders|davon|darin|da drin|drin|{reply})\b",
        ),
        WORDS,
    ),
    no_reference=table(
        (r"\b(?:kannst|konntest|wurdest|gibt) (?:du|es)\b|\bso ein\w*\b|\bdas (?=[a-z]+ )",)
    ),
    pointed=table(
        (
            r"\bzu \w+|\b(?:fehlt|fehlen|vergessen|ubersehen|vertauscht|verwechselt)\b",
            r"\b(?:ich (?:wollte|meinte)|gebeten|statt|sondern|ware|heisst|schreibt sich)\b",
            r"\b(?:falsch|richtig)\b.*\d",
        )
    ),
    imperative=table(
        (
            r"^(?:(?:und|also|dann|bitte|nur|auch|aber|mal|lieber|diesmal)\s+)*(?:{redo}e?|schau|"
            r"nur|kein|keine|keinen|ohne|mit|in|einfach|sag|nenn|schick)\b",
        ),
        WORDS,
    ),
    order=table(
        (
            r"^(?:(?:und|also|dann|bitte|aber|nein|lieber|stattdessen|ok)\W+)*(?:{redo}e?|sag|"
            r"nenn|schau|erwahn|beschreib|beantworte?|zahl)e?\b",
        ),
        WORDS,
    ),
    contrast=re.compile(
        r"[,;:—–-]*\s+(?:aber|jedoch|allerdings|nur dass|trotzdem|bis auf|ausser)\s*,?\s+|"
        r"^(?:aber|jedoch|allerdings|nur)\s*,?\s+",
        re.IGNORECASE,
    ),
    conjunction=re.compile(r"\s+(?:und|weil|da|denn)\s+", re.IGNORECASE),
    answered=re.compile(
        r"^(?:nein|ne|nee|ja|jo|jep|klar|sicher|genau|richtig|stimmt)\b(?!\W+dank)\W*",
        re.IGNORECASE,
    ),
    bare=words_of(
        """
        bitte kannst konntest du sie das es nochmal noch mal einmal erneut neu versuch versuche mach
        mache korrigieren korrigier prufen pruf schau anders von vorn vorne antworte auf meine frage
        und jetzt dann so also nein ok okay wieder richtig ordentlich alles
        """
    ),
    common=words_of(
        """
        der die das den dem des ein eine einen einem einer und oder aber von zu in im an am auf bei
        für fur mit nach aus um über uber ohne als wie ist sind war waren sein wird werden wurde
        wurden hat haben habe hab hast hatte hatten kann kannst können konnen könnte konnte soll
        sollte muss müsste musste will wollte mag möchte ich mir mich mein meine du dir dich dein
        deine er sie es ihr ihm wir uns unser sich man da dort hier dann denn doch ja nein nicht nur
        auch noch schon mal so sehr ganz bitte danke dank was wer wo wann warum welche welcher
        nochmal etwas alles nichts kein keine wenn weil dass ob zum zur bis vom mach mache schreib
        schreibe sag gib text satz sätze satze liste punkte antwort kurz kurzer kürzer lang einfach
        freundlich formell besser gut richtig falsch wirklich eigentlich einmal wieder jetzt
        """
    ),
)
